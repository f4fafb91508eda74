# SPDX-License-Identifier: Apache-2.0
"""Grace periods: the rule against random histories, and what is promised of each verb.

The histories are those of ``grace_model``: signal handlers that block, page faults inside
blocks, nested frames on either stack, siglongjmp and swapcontext out of handlers, threads
that come and go, forks and shared address spaces, stacks inside stacks; and steps of the
program between any two things that the observer looks at.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from optpoline.model import Addr
from optpoline.patch.grace import PATIENCE, GracePeriods, Look, RetiredCode, ThreadKey
from optpoline.patch.ranges import AddressRanges
from tests.unit.patch.grace_model import (
    Continuation,
    Frame,
    Program,
    Region,
    RegionKind,
    Stack,
    State,
    Thread,
)
from tests.unit.patch.grace_model_observer import ModelObserver

N_BLOCKS = 2
MAX_THREADS = 6

a_step = st.integers(0, (1 << 14) - 1)
a_script = st.lists(st.just(0) | a_step.map(lambda n: n + 1), max_size=40)
some_stacks = st.sampled_from(
    [(RegionKind.OWN,), (RegionKind.MADE,), (RegionKind.OWN, RegionKind.MADE)]
)


class GraceMachine(RuleBasedStateMachine):
    """A program, its grace periods, and the memory of its blocks."""

    stacks: st.SearchStrategy[tuple[RegionKind, ...]] = st.just(())
    is_tidy = True
    is_large = False

    program: Program
    observer: ModelObserver
    grace: GracePeriods

    @initialize(data=st.data(), n_threads=st.integers(1, 3), max_looks=st.sampled_from([1, 100]))
    def begin(self, data: st.DataObject, n_threads: int, max_looks: int) -> None:
        """Start a program and begin to watch it."""
        self.program = Program(
            n_threads=n_threads,
            n_blocks=N_BLOCKS,
            stacks=data.draw(self.stacks),
            is_tidy=self.is_tidy,
        )
        self.observer = ModelObserver(
            self.program,
            is_switching=not self.is_tidy,
            is_large=self.is_large,
            max_looks=max_looks,
        )
        self.grace = GracePeriods(self.observer)

    @rule(steps=st.lists(a_step, min_size=1, max_size=6))
    def go_on(self, steps: list[int]) -> None:
        """Let the program go on."""
        for number in steps:
            self.program.step(number)

    @precondition(lambda self: State.LIVE in self.program.states)
    @rule()
    def retire(self) -> None:
        """Retire a block: nothing leads there any more."""
        block = self.program.states.index(State.LIVE)
        self.program.states[block] = State.RETIRED
        self.grace.retire(self.program.code_of(block))

    @precondition(lambda self: State.FREE in self.program.states)
    @rule()
    def reuse(self) -> None:
        """Put another block where there was one."""
        self.program.reuse(self.program.states.index(State.FREE))

    @precondition(lambda self: not self.grace.is_idle)
    @rule(script=a_script, hurry=st.booleans())
    def poll(self, script: list[int], hurry: bool) -> None:
        """Look once, while the program goes on; poison what has expired."""
        self.observer.script = script
        self.grace.poll(self.grace.start_poll(), hurry=hurry)
        self.observer.script = []
        self.free()

    def free(self) -> None:
        """Free the blocks that have expired."""
        for code in self.grace.take_expired():
            block = self.program.block_at(code)
            assert self.program.states[block] is State.RETIRED
            self.program.states[block] = State.FREE

    @invariant()
    def nobody_is_in_code_that_was_freed(self) -> None:
        """No thread, and no context that could be resumed, now or later."""
        assert self.program.find_lost() == []

    def teardown(self) -> None:
        """All that is retired expires, in so many looks, once nobody is in it."""
        self.program.calm_down()
        n_retired = self.program.states.count(State.RETIRED)
        # Those under way, and those for what they kept back; one thread a stop at worst.
        for _ in range(2 * (PATIENCE + MAX_THREADS + 2)):
            if self.grace.is_idle:
                break
            self.grace.poll(self.grace.start_poll())
        self.free()
        if self.is_large and self.observer.is_proved:
            return  # nothing is reused, and that is reported
        assert self.grace.is_idle
        assert self.program.states.count(State.RETIRED) == 0
        assert self.grace.statistics.n_expired >= n_retired


class SwitchingMachine(GraceMachine):
    """A program that parks contexts whose saved PCs lie still, such as signal frames."""

    stacks = some_stacks


class LargeSwitchingMachine(SwitchingMachine):
    """The same with so much memory that a suspicion cannot be looked into in a stop."""

    is_large = True


class MovingMachine(GraceMachine):
    """One that moves and clears saved PCs as it likes, and was seen to switch stacks."""

    stacks = some_stacks
    is_tidy = False


MACHINES = pytest.mark.parametrize(
    "machine", [GraceMachine, SwitchingMachine, LargeSwitchingMachine, MovingMachine]
)


def run_machine(machine: type[GraceMachine], n_histories: int) -> None:
    """Try random histories."""
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=n_histories,
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )


@MACHINES
def test_random_histories(machine: type[GraceMachine]) -> None:
    run_machine(machine, 50)


@pytest.mark.torture
@pytest.mark.timeout(900)
@MACHINES
def test_many_random_histories(machine: type[GraceMachine]) -> None:
    run_machine(machine, 3000)


# --- histories that no random one may come upon soon


def begin_program(n_threads: int) -> tuple[Program, list[Thread]]:
    """Start a program that makes stacks which look like threads' own."""
    program = Program(n_threads=n_threads, n_blocks=2, stacks=(RegionKind.OWN,), is_tidy=True)
    return program, [thread for _, thread in program.threads()]


def interrupt_in(block: int, one: Continuation) -> None:
    """Let a signal handler interrupt it in a block."""
    one.frames.append(Frame((block, 0), one.base))


def go_to(program: Program, thread: Thread, base: Stack) -> None:
    """Park what a thread runs, and let it sleep in a new coroutine on that stack."""
    (process,) = program.processes
    process.parked.append(thread.continuation)
    thread.continuation = Continuation(base, Stack(Region(RegionKind.OWN, 99), 1))
    sleep_again(thread)


def sleep_again(thread: Thread) -> None:
    """Let a thread wake and sleep."""
    thread.is_asleep = True
    thread.n_switches += 1


def expire(program: Program, grace: GracePeriods) -> set[int]:
    """Wait for the grace period of all that is retired; return the blocks that are free."""
    handle = grace.start_poll()
    while not grace.poll(handle):
        pass
    return {program.block_at(code) for code in grace.take_expired()}


def retire_all(program: Program) -> GracePeriods:
    """Retire both blocks."""
    grace = GracePeriods(ModelObserver(program))
    for block in range(2):
        program.states[block] = State.RETIRED
        grace.retire(program.code_of(block))
    return grace


@pytest.mark.parametrize("place", [-5, 5])
def test_coroutine_on_the_stack_that_it_was_called_on(place: int) -> None:
    # In an array of main(), say; or two in one mapping, the other one parked.
    program, (thread,) = begin_program(1)
    one = thread.continuation
    interrupt_in(0, one)
    go_to(program, thread, Stack(one.base.region, one.base.place + place))
    assert expire(program, retire_all(program)) == {1}


def test_coroutine_on_the_stack_of_another_thread() -> None:
    program, (thread, other) = begin_program(2)
    lower = thread.continuation.base
    sleep_again(thread)
    one = Continuation(Stack(lower.region, lower.place + 5), other.continuation.alternate)
    elsewhere, other.continuation = other.continuation.base, one
    one.pc = (0, 0)
    grace = retire_all(program)
    # The first is seen outside, with all of its stack above; then the other one leaves there.
    assert not grace.poll(grace.start_poll())
    one.pc = None
    interrupt_in(0, one)
    go_to(program, other, elsewhere)
    assert expire(program, grace) == {1}


def test_thread_between_two_coroutines() -> None:
    program, (thread,) = begin_program(1)
    (process,) = program.processes
    first = thread.continuation
    interrupt_in(1, first)
    go_to(program, thread, Stack(Region(RegionKind.OWN, 98), 1))
    interrupt_in(0, thread.continuation)
    grace = retire_all(program)
    assert not grace.poll(grace.start_poll())
    # It leaves the one block, and goes on in the handler over the other.
    thread.continuation.frames.clear()
    process.parked = [thread.continuation]
    thread.continuation = first
    sleep_again(thread)
    assert expire(program, grace) == {0}


# --- the parts of the rule, one by one

ONE, TWO, CHILD = (100, 101), (100, 102), (200, 200)
FIRST, SECOND = RetiredCode(Addr(0x1000), Addr(0x1040)), RetiredCode(Addr(0x1080), Addr(0x10C0))
IN_FIRST, IN_SECOND = 0x1008, 0x10BF


class ScriptedObserver:
    """Shows what it is told to, and notes what it was asked.

    Args:
        looks: What each look without a stop shows; the last one again and again.
        stopped: The same of looks in a stop.
        found: What each search of memory finds, likewise.
    """

    def __init__(
        self,
        looks: Sequence[Look],
        stopped: Sequence[Look] = (),
        found: Sequence[frozenset[int] | None] = (frozenset(),),
    ) -> None:
        """Begin with the first of each."""
        self.looks, self.stopped, self.found = list(looks), list(stopped), list(found)
        self.switching = False
        self.switching_after_stop = False
        self.n_suspicions = 0
        self.asked: list[tuple[str, frozenset[ThreadKey]]] = []

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Show the next look."""
        self.asked.append(("look", frozenset(known)))
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Show the next look in a stop."""
        self.asked.append(("stop", frozenset(known)))
        self.switching |= self.switching_after_stop
        return self.stopped.pop(0) if len(self.stopped) > 1 else self.stopped[0]

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        """Find the next addresses; any is a context, so the program switches stacks."""
        self.asked.append(("search", frozenset()))
        found = self.found.pop(0) if len(self.found) > 1 else self.found[0]
        self.switching |= bool(found)
        return found

    def is_switching(self) -> bool:
        """Tell what is known by now."""
        return self.switching

    def suspect_switching(self) -> None:
        """Count that."""
        self.n_suspicions += 1

    @property
    def verbs(self) -> list[str]:
        """What was asked, without details."""
        return [verb for verb, _ in self.asked]


class SuspiciousObserver(ScriptedObserver):
    """Heeds what it is told of suspicions, and finds contexts that are none."""

    is_excusing = False
    """Whether a search in a stop is out of the question."""

    def suspect_switching(self) -> None:
        """Take it for one."""
        self.switching = True

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Drop the suspicion if there is too much memory."""
        look = super().look_stopped(ranges, known)
        self.switching &= not self.is_excusing
        return look

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        """Find the next addresses, which prove nothing."""
        found = super().search(ranges)
        self.switching = False
        return found


def make_look(
    quiescent: Collection[ThreadKey] = (),
    others: Collection[ThreadKey] = (),
    *,
    holding: Mapping[ThreadKey, int] | None = None,
    pointed_to: Collection[int] | None = None,
) -> Look:
    """Return a look: who is quiescent, who else there is, who is where."""
    held = {key: frozenset([addr]) for key, addr in (holding or {}).items()}
    return Look(
        quiescent=frozenset(quiescent),
        threads=frozenset([*quiescent, *others, *held]),
        holding=held,
        pointed_to=None if pointed_to is None else frozenset(pointed_to),
    )


def retire(observer: ScriptedObserver, *code: RetiredCode, is_last: bool = False) -> GracePeriods:
    """Return grace periods with code that waits for the first."""
    grace = GracePeriods(observer, is_last=is_last)
    for one in code:
        grace.retire(one)
    return grace


def test_nothing_retired_is_over_at_once() -> None:
    observer = ScriptedObserver([])
    grace = GracePeriods(observer)
    assert grace.is_idle
    assert grace.poll(grace.start_poll())
    assert grace.synchronize(0.0)
    assert observer.asked == []


def test_all_asleep_and_outside_takes_one_look_and_no_stop() -> None:
    observer = ScriptedObserver([make_look([ONE, TWO])])
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    assert grace.take_expired() == ()
    assert grace.poll(handle)
    assert observer.verbs == ["look", "search"]
    assert grace.take_expired() == (FIRST, SECOND)
    assert grace.take_expired() == ()
    assert grace.is_idle
    statistics = grace.statistics
    assert (statistics.n_retired, statistics.n_expired, statistics.n_periods) == (2, 2, 1)
    assert (statistics.n_stops, statistics.n_kept_back) == (0, 0)


def test_threads_that_run_are_stopped_when_patience_is_over() -> None:
    observer = ScriptedObserver([make_look([ONE], [TWO])], [make_look([TWO], [ONE])])
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    for _ in range(PATIENCE):
        assert not grace.poll(handle)
        assert grace.holders == (TWO,)
    assert observer.verbs == ["look"] * PATIENCE
    assert grace.poll(handle)
    assert observer.verbs[PATIENCE:] == ["look", "stop", "search"]
    assert grace.holders == ()
    assert grace.statistics.n_stops == 1


def test_hurry_stops_them_at_once() -> None:
    observer = ScriptedObserver([make_look([ONE], [TWO])], [make_look([TWO], [ONE])])
    grace = retire(observer, FIRST)
    assert grace.poll(grace.start_poll(), hurry=True)
    assert observer.verbs == ["look", "stop", "search"]


def test_who_was_seen_outside_needs_no_other_look() -> None:
    observer = ScriptedObserver([make_look([ONE], [TWO]), make_look([TWO], [ONE])])
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    assert not grace.poll(handle)
    assert grace.poll(handle)
    assert observer.asked[:2] == [("look", frozenset()), ("look", frozenset([ONE]))]


def test_child_that_was_forked_meanwhile_is_looked_at() -> None:
    observer = ScriptedObserver([make_look([ONE], [CHILD]), make_look([CHILD], [ONE])])
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    assert not grace.poll(handle)
    assert grace.holders == (CHILD,)
    assert grace.take_expired() == ()
    assert grace.poll(handle)


def test_ids_of_a_thread_that_is_gone_may_be_those_of_another() -> None:
    # ONE was seen outside and exits; TWO, inside, starts a process that gets ONE's ids.
    observer = ScriptedObserver(
        [make_look([ONE], [TWO]), make_look([], [TWO]), make_look([TWO], [ONE])]
    )
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    for _ in range(3):
        assert not grace.poll(handle)
    assert grace.holders == (ONE,)


def test_thread_that_stays_inside_keeps_back_only_where_it_is() -> None:
    observer = ScriptedObserver(
        [make_look([ONE], holding={TWO: IN_FIRST})], [make_look([], [ONE], holding={TWO: IN_FIRST})]
    )
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    for _ in range(PATIENCE):
        assert not grace.poll(handle)
        assert grace.holders == (TWO,)
        assert grace.take_expired() == ()
    assert grace.poll(handle)
    assert grace.take_expired() == (SECOND,)
    assert not grace.is_idle
    assert grace.start_poll() == handle + 1
    assert (grace.statistics.n_expired, grace.statistics.n_kept_back) == (1, 1)
    # It leaves: the next grace period is for what was kept back.
    observer.looks = [make_look([ONE, TWO])]
    assert grace.poll(grace.start_poll())
    assert grace.take_expired() == (FIRST,)
    assert grace.is_idle


def test_thread_that_was_seen_elsewhere_may_be_on_another_stack() -> None:
    # Two coroutines of one thread were interrupted, each in a block of its own.
    looks = [make_look(holding={ONE: IN_FIRST}), make_look(holding={ONE: IN_SECOND})]
    observer = ScriptedObserver(looks, [make_look(holding={ONE: IN_SECOND})])
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    assert not grace.poll(handle)
    assert observer.n_suspicions == 0
    assert not grace.poll(handle)
    assert observer.n_suspicions == 1
    while not grace.poll(handle):
        assert grace.take_expired() == ()
    # Of the first block the search would have told.
    assert grace.take_expired() == (FIRST,)
    assert grace.holders == (ONE,)


def test_suspicion_is_looked_into_in_one_stop() -> None:
    looks = [make_look(holding={ONE: IN_FIRST}), make_look(holding={ONE: IN_SECOND})]
    stopped = make_look(holding={ONE: IN_SECOND}, pointed_to=[IN_FIRST])
    observer = SuspiciousObserver(looks, [stopped])
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    while not grace.poll(handle):
        assert grace.take_expired() == ()
    assert observer.asked[-1] == ("stop", frozenset())
    assert grace.take_expired() == ()


def test_cancelled_code_neither_expires_nor_is_kept_back() -> None:
    observer = ScriptedObserver([make_look([], [ONE]), make_look([ONE])], found=[frozenset()])
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    assert not grace.poll(handle)
    grace.cancel([FIRST])
    assert not grace.is_idle
    assert grace.poll(handle)
    assert grace.take_expired() == (SECOND,)
    assert grace.is_idle


def test_period_for_what_nobody_waits_for_is_over() -> None:
    observer = ScriptedObserver([make_look([], [ONE]), make_look([ONE])], found=[frozenset()])
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    assert not grace.poll(handle)
    grace.retire(SECOND)
    later = grace.start_poll()
    grace.cancel([FIRST])
    assert grace.poll(handle)
    assert not grace.is_idle
    grace.retire(FIRST)
    assert grace.poll(later)
    assert grace.take_expired() == (FIRST, SECOND)


def test_program_too_large_for_that_is_excused() -> None:
    looks = [make_look(holding={ONE: IN_FIRST}), make_look(holding={ONE: IN_SECOND})]
    looks.append(make_look([ONE]))
    observer = SuspiciousObserver(looks, [make_look([ONE])], [frozenset([IN_SECOND])])
    observer.is_excusing = True
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    while not grace.poll(handle):
        assert grace.take_expired() == ()
    assert observer.verbs[-2:] == ["stop", "search"]
    assert grace.take_expired() == (FIRST,)
    assert not grace.is_search_refused


def test_what_memory_points_to_is_kept_back() -> None:
    observer = ScriptedObserver(
        [make_look([ONE])],
        [make_look([ONE], pointed_to=[IN_SECOND]), make_look([ONE], pointed_to=[])],
        [frozenset([IN_SECOND])],
    )
    grace = retire(observer, FIRST, SECOND)
    handle = grace.start_poll()
    # The first context found is news: from now on it takes a stop.
    assert not grace.poll(handle)
    assert grace.take_expired() == ()
    assert grace.poll(handle, hurry=True)
    assert observer.verbs == ["look", "search", "look", "stop"]
    assert grace.take_expired() == (FIRST,)
    assert grace.poll(grace.start_poll(), hurry=True)
    assert grace.take_expired() == (SECOND,)
    assert grace.is_idle


def test_program_that_switches_stacks_is_looked_at_whole_in_one_stop() -> None:
    observer = ScriptedObserver([make_look([ONE, TWO])], [make_look([ONE, TWO], pointed_to=[])])
    observer.switching = True
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    for _ in range(PATIENCE):
        assert not grace.poll(handle)
    assert grace.poll(handle)
    assert observer.verbs == [*["look"] * (PATIENCE + 1), "stop"]
    # What is known of the threads is of no use: a context may have gone to one since.
    assert observer.asked[-1] == ("stop", frozenset())


def test_thread_not_seen_in_that_stop_holds_it_up() -> None:
    observer = ScriptedObserver([make_look([ONE, TWO])], [make_look([ONE], [TWO], pointed_to=[])])
    observer.switching = True
    grace = retire(observer, FIRST)
    assert not grace.poll(grace.start_poll(), hurry=True)
    assert grace.holders == (TWO,)


def test_what_a_thread_held_in_that_stop_counts_when_it_is_gone_since() -> None:
    # Memory was searched before it parked its context there and exited.
    seen = Look(
        quiescent=frozenset([ONE]),
        threads=frozenset([ONE]),
        holding={TWO: frozenset([IN_FIRST])},
        pointed_to=frozenset(),
    )
    observer = ScriptedObserver([make_look([ONE], [TWO])], [seen])
    observer.switching = True
    grace = retire(observer, FIRST, SECOND)
    for _ in range(PATIENCE + 1):
        grace.poll(grace.start_poll())
    assert grace.take_expired() == (SECOND,)


def test_stop_that_shows_the_first_switch_of_stacks_ends_nothing() -> None:
    # It was begun as one in which memory need not be searched.
    observer = ScriptedObserver([make_look([], [ONE])], [make_look([ONE], pointed_to=[])])
    observer.switching_after_stop = True
    grace = retire(observer, FIRST)
    handle = grace.start_poll()
    assert not grace.poll(handle, hurry=True)
    assert grace.take_expired() == ()
    assert grace.poll(handle, hurry=True)
    assert observer.verbs == ["look", "stop", "look", "stop"]


@pytest.mark.parametrize("switching", [False, True])
def test_too_much_memory_to_search_keeps_all(switching: bool) -> None:
    observer = ScriptedObserver([make_look([ONE])], [make_look([ONE])], [None, frozenset()])
    observer.switching = switching
    grace = retire(observer, FIRST, SECOND)
    assert grace.poll(grace.start_poll(), hurry=True)
    assert grace.take_expired() == ()
    assert grace.is_search_refused
    assert not grace.is_idle
    assert grace.statistics.n_kept_back == 2
    observer.switching = False
    observer.found = [frozenset()]
    assert grace.poll(grace.start_poll(), hurry=True)
    assert grace.take_expired() == (FIRST, SECOND)
    assert not grace.is_search_refused


def test_last_grace_period_searches_twice_where_a_stop_is_too_short() -> None:
    observer = ScriptedObserver([make_look([ONE])], [make_look([ONE])])
    observer.switching = True
    grace = retire(observer, FIRST, is_last=True)
    assert grace.poll(grace.start_poll(), hurry=True)
    assert observer.verbs == ["look", "stop", "search", "search"]
    assert grace.take_expired() == (FIRST,)


def test_handle_covers_what_was_retired_before_it() -> None:
    observer = ScriptedObserver([make_look([], [ONE]), make_look([ONE])])
    grace = retire(observer, FIRST)
    first = grace.start_poll()
    assert not grace.poll(first)
    # Retired when ONE might have been looked at already: that takes another grace period.
    grace.retire(SECOND)
    second = grace.start_poll()
    assert second == first + 1
    assert not grace.poll(second)
    assert grace.take_expired() == (FIRST,)
    assert grace.poll(first)
    assert grace.poll(second)
    assert grace.take_expired() == (SECOND,)


def test_synchronize_ends_when_time_is_up() -> None:
    observer = ScriptedObserver([make_look([], [ONE])], [make_look([], [ONE])])
    grace = retire(observer, FIRST)
    assert not grace.synchronize(0.0)
    assert observer.verbs == ["look", "stop"]
    assert grace.holders == (ONE,)
    assert grace.take_expired() == ()
    observer.looks = [make_look([ONE])]
    assert grace.synchronize(0.0)
    assert grace.take_expired() == (FIRST,)
