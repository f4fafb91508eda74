# SPDX-License-Identifier: Apache-2.0
"""Programs of which some threads are workers of the kernel: io_uring has such."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.address_space import child_space
from optpoline.controller.late_calls import wait_for_late_calls_of
from optpoline.controller.observer import ThreadObserver
from optpoline.controller.summary import DetachOutcome, SessionState
from optpoline.controller.target import Target
from optpoline.errors import ProcessGone
from optpoline.model import Addr
from optpoline.patch.ranges import AddressRanges
from optpoline.process.leader import has_ended, is_exiting
from optpoline.process.memory import RemoteMemory
from optpoline.process.perf import PcSampler
from optpoline.process.permissions import check_attachable
from optpoline.process.procfs import read_maps
from optpoline.process.scene import read_scene
from optpoline.process.stop import Wake, stop_threads
from optpoline.x86.syscalls import SYS_GETPID
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.serving import learn_and_promote, promote
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

WORKERS = {"busy": "R", "idle": "S", "async": "S"}
"""The state of the worker by mode of the target."""

_TIMEOUT_S = 30.0


def _find_worker(pid: int, state: str) -> int | None:
    """Return the thread that the kernel has made, if it is in this state."""
    for tid in map(int, os.listdir(f"/proc/{pid}/task")):
        stat = Path(f"/proc/{pid}/task/{tid}/stat").read_text()
        name, _, fields = stat.rpartition(") ")
        if name.startswith(f"{tid} (iou-") and fields[0] == state:
            return tid
    return None


def _start(start_target: StartTarget, worker: str, first: str) -> tuple[LiveTarget, int]:
    """Start a target; return it and its worker, once that does what it is to do."""
    target = start_target("workers", worker, first, flags=RETPOLINE)
    deadline = time.monotonic() + _TIMEOUT_S
    while (tid := _find_worker(target.pid, WORKERS[worker])) is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    if first == "wait":
        target.wait_for_state("S")
    return target, tid


def _leave(target: LiveTarget, worker: int) -> None:
    """Have all threads exit but the worker."""
    target.tell("leave")
    target.wait_for_state("Z")
    deadline = time.monotonic() + _TIMEOUT_S
    while set(os.listdir(f"/proc/{target.pid}/task")) != {str(target.pid), str(worker)}:
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.parametrize("worker", WORKERS)
def test_is_neither_stopped_nor_waited_for(start_target: StartTarget, worker: str) -> None:
    """The first thread sleeps in io_uring_enter, and is the only one that can be woken."""
    target, _ = _start(start_target, worker, "wait")
    wait_for_late_calls_of(target.pid)
    own = Target(target.pid, stop_timeout_s=_TIMEOUT_S)
    assert own.may_wake_all()
    own.close()
    with RemoteMemory(target.pid) as memory:
        with stop_threads(target.pid, memory=memory, wake=Wake.NONE) as stop:
            assert (stop.stopped, stop.asleep) == ((), (target.pid,))
        with stop_threads(target.pid, memory=memory) as stop:
            assert stop.inject(SYS_GETPID) == target.pid
        with stop_threads(target.pid, memory=memory, wake=Wake.ALL) as stop:
            assert [thread.tid for thread in stop.stopped] == [target.pid]
            assert stop.asleep == ()
    assert target.finish() == "wrong 0 rounds 1\n"


@pytest.mark.parametrize("worker", WORKERS)
def test_holds_no_grace_period_up(start_target: StartTarget, worker: str) -> None:
    target, _ = _start(start_target, worker, "wait")
    space = child_space(target.pid, may_stop=True, timeout_ns=10**9)
    observer = ThreadObserver(lambda: (space,))
    ranges = AddressRanges([(Addr(1), Addr(2))])
    for look in (observer.look(ranges, ()), observer.look_stopped(ranges, ())):
        assert look.threads == look.quiescent == {(target.pid, target.pid)}
    scene = read_scene(target.pid, Path("/proc"), Path("/proc/sys"))
    assert scene is not None
    assert [thread.number("Pid") for thread in scene.threads] == [target.pid]
    with PcSampler(target.pid) as sampler:
        sampler.sample(0.01)
        assert (sampler.n_watched, sampler.n_unwatched) == (1, 0)
    assert target.finish() == "wrong 0 rounds 1\n"


@pytest.mark.parametrize("worker", WORKERS)
def test_program_is_promoted(start_target: StartTarget, worker: str) -> None:
    """A worker has the thread pointer of who made it, but counts nothing in its area."""
    target, _ = _start(start_target, worker, "run")
    before = Witness.of(target.pid)
    with promote(target.pid) as session:
        assert all(arena.rows.rseq is not None for arena in session.target.arenas)
        session.watch(0.1)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_waiting_program_is_let_go(start_target: StartTarget) -> None:
    target, _ = _start(start_target, "busy", "wait")
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(0.02)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish() == "wrong 0 rounds 1\n"


def test_program_ends_with_its_last_thread(start_target: StartTarget) -> None:
    """The worker of a queue that is polled stays, and keeps the memory."""
    target, worker = _start(start_target, "idle", "run")
    config = optpoline.Config(maps_every_s=0.05)
    with optpoline.attach(target.pid, config=config) as session:
        learn_and_promote(session)
        _leave(target, worker)
        assert session.watch(_TIMEOUT_S) is SessionState.EXITED
    assert has_ended(target.pid)
    assert is_exiting(target.pid)
    with pytest.raises(ProcessGone):
        read_maps(target.pid)
    with pytest.raises(ProcessGone, match="zombie"):
        check_attachable(target.pid)
