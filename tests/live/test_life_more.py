# SPDX-License-Identifier: Apache-2.0
"""Children, threads and modules that come and go faster than we can look; sudden ends."""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome, SessionState
from optpoline.errors import ProcessGone
from optpoline.model import Site
from optpoline.process.leader import find_live_tid
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import list_tids, read_state_char
from optpoline.process.sharers import SharerFinder, find_sharers
from optpoline.process.stop import Wake, stop_threads
from tests.live.conftest import BuildTarget, LiveTarget, StartTarget
from tests.live.serving import learn_and_promote, promote, serve
from tests.live.witness import (
    RETPOLINE,
    Witness,
    arena_mappings,
    run_cli,
    start_cli,
    wait_for_line,
)

pytestmark = pytest.mark.live

PLUGIN = ("-shared", "-fPIC", *RETPOLINE)
_TIMEOUT_S = 60.0

N_SHORT_LIVED = 5_000
"""Threads that begin and end during one test; at most 32 at once."""


def _rounds_of(answer: str) -> list[int]:
    """Return the numbers of an answer."""
    return [int(word) for word in answer.split() if word.isdigit()]


# --- processes that share the memory


@pytest.fixture(params=["clone", "orphan", "sibling"])
def clone(
    start_target: StartTarget, request: pytest.FixtureRequest
) -> Iterator[tuple[LiveTarget, int]]:
    """Start a program with a child in its memory, which is killed at the end if it still runs.

    Its parent may have exited, or be another than the program.
    """
    target = start_target("kin", request.param, flags=RETPOLINE)
    assert target.process.stdout is not None
    (child,) = _rounds_of(target.process.stdout.readline())
    with _opened_pidfd(child) as pidfd:
        assert find_sharers(target.pid) == (child,)
        yield target, child
        if not select.select([pidfd], [], [], 0)[0]:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
        if request.param == "sibling":
            os.waitpid(child, 0)  # it is ours


@contextmanager
def _opened_pidfd(pid: int) -> Iterator[int]:
    """Open a descriptor that stands for a process whatever becomes of its number."""
    pidfd = os.pidfd_open(pid)
    try:
        yield pidfd
    finally:
        os.close(pidfd)


def _is_promoted(pid: int, site: Site) -> bool:
    """Tell whether a site leads elsewhere than at first."""
    with RemoteMemory(pid) as memory:
        return memory.read(site.addr, len(site.code)) != site.code


def test_a_child_in_the_same_memory(clone: tuple[LiveTarget, int]) -> None:
    """Whichever of the two is attached to, both run what was promoted, and both are stopped."""
    target, child = clone
    before = Witness.of(target.pid)
    for pid in (target.pid, child):
        with promote(pid) as session:
            (site, *_) = (s for s in session.summary().sites if s.state.value == "promoted")
            (own,) = (s for s in session.sites if s.addr == site.address)
            assert _is_promoted(target.pid, own)
            assert _is_promoted(child, own)
            first = _rounds_of(target.ask("rounds"))
            session.watch(0.2)
            assert all(now > then for now, then in _pairs(_rounds_of(target.ask("")), first))
            assert session.detach().outcome is DetachOutcome.CLEAN
        before.check(target.pid)
        before.check_text(child)
    assert target.finish().startswith("wrong 0 rounds")


class _LateFinder(SharerFinder):
    """Finds nobody until the stop is under way, as if they had been started since."""

    n_looks = 0

    def look(self) -> tuple[int, ...]:
        """Look, but not before the first interrupt."""
        self.n_looks += 1
        return () if self.n_looks <= 2 else super().look()


@pytest.mark.parametrize("is_late", [False, True])
def test_a_stop_is_one_of_everybody_in_the_memory(
    clone: tuple[LiveTarget, int], is_late: bool
) -> None:
    target, child = clone
    with RemoteMemory(target.pid) as memory:
        for _ in range(10):
            sharers = _LateFinder(target.pid) if is_late else None
            with stop_threads(target.pid, memory=memory, wake=Wake.NONE, sharers=sharers) as stop:
                assert child in {thread.pid for thread in stop.stopped}
                assert read_state_char(child, child) == "t"
    target.ask("rounds")
    assert target.finish().startswith("wrong 0 rounds")


def _pairs(now: list[int], then: list[int]) -> list[tuple[int, int]]:
    """Return two lists side by side."""
    return list(zip(now, then, strict=True))


def test_a_child_that_outlives_its_parent(clone: tuple[LiveTarget, int]) -> None:
    """What was promoted stays in the memory that the child goes on with, and can be undone."""
    target, child = clone
    before = Witness.of(child)
    with promote(target.pid) as session:
        target.ask("leave")
        assert session.watch(10.0) is SessionState.EXITED
        assert session.detach().outcome is DetachOutcome.GONE
    assert before.changed_bytes(child)
    assert arena_mappings(child)
    run_cli("detach", child)
    before.check(child)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("when", ["learning", "promoted"])
def test_a_forked_child_is_restored_while_its_parent_goes_on(
    start_target: StartTarget, when: str
) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        if when == "promoted":
            learn_and_promote(session)
            child = int(target.ask("fork").split()[1])
        else:
            answers: list[str] = []
            is_over = threading.Event()

            def fork_when_learning() -> None:
                while not before.changed_bytes(target.pid):
                    time.sleep(0.001)
                answers.append(target.ask("fork"))
                is_over.set()

            asker = threading.Thread(target=fork_when_learning)
            asker.start()
            session.learn(_TIMEOUT_S, stop=is_over)
            asker.join()
            child = int(answers[0].split()[1])
            learn_and_promote(session)
        assert before.changed_bytes(child)
        run_cli("detach", child)
        before.check_text(child)
        assert arena_mappings(child) == []
        # Its parent has kept what it had.
        assert before.changed_bytes(target.pid)
        session.watch(0.1)
        assert target.ask("join").startswith("status 0 wrong 0 rounds")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- threads and modules in a hurry


def test_thousands_of_short_lived_threads(start_target: StartTarget) -> None:
    # Each of 6 makes 4 at a time: 31 with the first. Of 5 rounds, 4 are a thread's own.
    target = start_target("life", "short", "6", flags=RETPOLINE)
    before = Witness.of(target.pid)
    deadline = time.monotonic() + _TIMEOUT_S
    n_sessions = 0
    while _rounds_of(target.ask("rounds"))[0] * 4 // 5 < N_SHORT_LIVED:
        assert time.monotonic() < deadline
        with optpoline.attach(target.pid) as session:
            session.learn(0.1)
            session.promote()
            session.watch(0.2)
            assert session.detach().outcome is DetachOutcome.CLEAN
        before.check(target.pid)
        n_sessions += 1
    assert n_sessions > 0
    assert target.finish().startswith("wrong 0 rounds")


def test_a_module_loaded_and_unloaded_in_a_loop(
    start_target: StartTarget, build_target: BuildTarget
) -> None:
    """Thousands of times a second; we look ten times a second and may meet anything."""
    plugin = build_target("plugin", *PLUGIN)
    target = start_target("kin", "reload", str(plugin), flags=(*RETPOLINE, "-ldl"))
    config = optpoline.Config(learn_s=0.05, maps_every_s=0.05)
    first = _rounds_of(target.ask("rounds"))[1]
    for _ in range(3):
        with optpoline.attach(target.pid, config=config) as session:
            session.learn(0.05)
            session.promote()
            session.watch(0.5)
            assert session.detach().outcome in (DetachOutcome.CLEAN, DetachOutcome.ARENA_LEFT)
    assert _rounds_of(target.ask("rounds"))[1] - first > 100
    optpoline.restore(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- ends


def test_killed_while_attaching(start_target: StartTarget) -> None:
    """At any moment: an orderly end, said in one line, with the status that scripts know."""
    n_gone = 0
    for number in range(12):
        target = start_target("life", "spin", "2", flags=RETPOLINE)
        with start_cli("attach", "--learn-seconds", "0.3", target.pid) as controller:
            # From the start of the interpreter to the learning window.
            time.sleep(0.02 * number)
            os.kill(target.pid, signal.SIGKILL)
            _, said = controller.communicate(timeout=_TIMEOUT_S)
        assert "Traceback" not in said, said
        assert controller.returncode in (0, 4), (number, said)
        n_gone += controller.returncode == 4
        if controller.returncode == 0:
            assert "learning" in said, said
        assert target.process.wait(_TIMEOUT_S) == -signal.SIGKILL
    assert n_gone > 0


def test_its_first_thread_exits_during_a_session(start_target: StartTarget) -> None:
    target = start_target("confined", "later", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with promote(target.pid) as session:
        target.ask("leave")
        deadline = time.monotonic() + _TIMEOUT_S
        while read_state_char(target.pid, target.pid) != "Z":
            assert time.monotonic() < deadline
            time.sleep(0.001)
        assert session.watch(0.5) is SessionState.WATCHING
        assert session.summary().promoted == 1
        assert session.detach().outcome is DetachOutcome.CLEAN
    live = find_live_tid(target.pid)
    assert live in list_tids(target.pid)
    assert live != target.pid
    before.check(live)
    serve(target)
    assert target.finish().startswith("wrong 0 rounds")


def test_exit_right_after_the_attach_line(start_target: StartTarget) -> None:
    target = start_target("life", "spin", flags=RETPOLINE)
    with start_cli("attach", "--learn-seconds", "5", target.pid) as controller:
        wait_for_line(controller, "learning ")
        target.tell("exit")
        _, said = controller.communicate(timeout=_TIMEOUT_S)
    assert controller.returncode in (0, 4), said
    assert "Traceback" not in said
    assert target.process.wait(_TIMEOUT_S) == 7


def test_process_gone_is_told_apart_from_a_thread_that_is(start_target: StartTarget) -> None:
    """The id of a dead process is no process, whatever thread of ours has used it."""
    target = start_target("life", "spin", flags=RETPOLINE)
    target.finish()
    assert find_live_tid(target.pid) == target.pid
    with pytest.raises(ProcessGone):
        optpoline.attach(target.pid)
