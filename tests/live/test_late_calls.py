# SPDX-License-Identifier: Apache-2.0
"""Injected calls that a thread makes only after its controller was killed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

# Not through the module when they are called: the first use imports what takes long.
from optpoline import attach, restore
from optpoline.controller.left_arenas import find_arena_files
from optpoline.controller.summary import DetachOutcome
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import list_tids, read_maps
from optpoline.process.stop import Wake, stop_threads
from optpoline.x86.syscalls import SYS_MEMFD_CREATE, SYS_MMAP
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness, arena_mappings

pytestmark = pytest.mark.live

BEFORE_ENTRY, AT_ENTRY = 1, 2
"""Which time a thread is let go on during a call."""

HELD = """
import os, sys, time
import optpoline
from optpoline.process.inject import InjectionThread
from optpoline.process.ptrace import Tracer

pid, nr, n, cpu = map(int, sys.argv[1:])
os.sched_setaffinity(0, {cpu})
call, go_on = InjectionThread.call, Tracer.cont_to_syscall
now = []

def noted(self, number, *args, deadline_ns):
    now[:] = [number, 0]
    return call(self, number, *args, deadline_ns=deadline_ns)

def held(self, tid, signal=0):
    now[1] += 1
    if now == [nr, n]:
        print("held", flush=True)
        time.sleep(60)
    go_on(self, tid, signal)

InjectionThread.call, Tracer.cont_to_syscall = noted, held
optpoline.attach(pid)
"""
"""A controller that holds a thread in the middle of a call, to be killed there."""

HOG = """
import os, sys, time
os.sched_setaffinity(0, {int(sys.argv[1])})
os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(2))
print("spinning", flush=True)
end_s = time.monotonic() + 0.25
while time.monotonic() < end_s: pass
"""
"""Keeps all threads of normal priority, and of ours, off a CPU for a while."""


@contextmanager
def _started(program: str, *args: int, line: str) -> Iterator[subprocess.Popen[str]]:
    """Start a program and wait for a line; it is killed at the end."""
    command = [sys.executable, "-c", program, *map(str, args)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert process.stdout.readline() == f"{line}\n"
            yield process
        finally:
            process.kill()


@pytest.fixture
def cpus() -> Iterator[tuple[int, int]]:
    """Return a CPU for us, which we stay on, and one for the target."""
    before = os.sched_getaffinity(0)
    ours, theirs = sorted(before)[:2]
    os.sched_setaffinity(0, {ours})
    yield ours, theirs
    os.sched_setaffinity(0, before)


@contextmanager
def _left_before_call(target: LiveTarget, nr: int, cpus: tuple[int, int]) -> Iterator[None]:
    """Leave a thread in the kernel, about to make a call, without a CPU to make it on."""
    ours, theirs = cpus
    for tid in list_tids(target.pid):
        os.sched_setaffinity(tid, {theirs})
    with (
        _started(HELD, target.pid, nr, AT_ENTRY, ours, line="held") as controller,
        _started(HOG, theirs, line="spinning") as hog,
    ):
        controller.kill()
        controller.wait()
        yield
        hog.wait()


def test_file_is_created_late(start_target: StartTarget, cpus: tuple[int, int]) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with _left_before_call(target, SYS_MEMFD_CREATE, cpus):
        assert restore(target.pid).outcome is DetachOutcome.CLEAN
    _wait_until_back(target)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_arena_is_mapped_late(start_target: StartTarget, cpus: tuple[int, int]) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with _left_before_call(target, SYS_MMAP, cpus):
        attach(target.pid).detach()
    _wait_until_back(target)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_call_that_was_not_entered_is_never_made(
    start_target: StartTarget, cpus: tuple[int, int]
) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    held = (target.pid, SYS_MEMFD_CREATE, BEFORE_ENTRY, cpus[0])
    with _started(HELD, *held, line="held") as controller:
        controller.kill()
        controller.wait()
    _wait_until_back(target)
    assert find_arena_files(target.pid) == ()
    assert arena_mappings(target.pid) == []
    assert target.finish().startswith("wrong 0 rounds")


def _wait_until_back(target: LiveTarget) -> None:
    """Wait until the thread that runs is in the program's own code."""
    path = os.readlink(f"/proc/{target.pid}/exe")
    code = [m for m in read_maps(target.pid) if m.path == path and m.is_executable]
    is_back = False
    with RemoteMemory(target.pid) as memory:
        while not is_back:
            with stop_threads(target.pid, memory=memory, wake=Wake.NONE) as stop:
                pcs = [thread.pc for thread in stop.stopped]
            is_back = any(m.start <= pc < m.end for pc in pcs for m in code)
            time.sleep(0.001)
