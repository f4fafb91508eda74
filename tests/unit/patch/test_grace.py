# SPDX-License-Identifier: Apache-2.0
"""Grace periods: the rule against random histories, and what is promised of each verb.

The histories are those of ``grace_model``: signal handlers that block, page faults inside
blocks, nested frames on either stack, siglongjmp and swapcontext out of handlers, threads
that come and go, forks and shared address spaces; and steps of the program between any
two things that the observer looks at.
"""

from __future__ import annotations

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

from optpoline.patch.grace import PATIENCE, GracePeriods
from tests.unit.patch.grace_model import ModelObserver, Program, RegionKind, State

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
            self.program, is_switching=not self.is_tidy, max_looks=max_looks
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
        assert self.grace.is_idle
        assert self.program.states.count(State.RETIRED) == 0
        assert self.grace.statistics.n_expired >= n_retired


class SwitchingMachine(GraceMachine):
    """A program that parks contexts whose saved PCs lie still, such as signal frames."""

    stacks = some_stacks


class MovingMachine(GraceMachine):
    """One that moves and clears saved PCs as it likes, and was seen to switch stacks."""

    stacks = some_stacks
    is_tidy = False


@pytest.mark.parametrize("machine", [GraceMachine, SwitchingMachine, MovingMachine])
def test_random_histories(machine: type[GraceMachine]) -> None:
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=150,
            stateful_step_count=50,
            deadline=None,
            suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
        ),
    )
