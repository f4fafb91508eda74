# SPDX-License-Identifier: Apache-2.0
"""System calls injected into programs that check that they were not disturbed."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import optpoline
from optpoline.errors import UnsupportedTarget
from optpoline.process.injection_code import find_injection_code
from optpoline.process.memory import RemoteMemory
from optpoline.process.stop import Wake, stop_threads
from optpoline.x86.syscalls import SYS_GETPID, SYS_MMAP, SYS_MUNMAP
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

AVX = ("-mavx",)
SYS_GETPPID = 110
PROT_READ_WRITE = 3
MAP_PRIVATE_ANONYMOUS = 0x22
_TIMEOUT_NS = 5_000_000_000
"""For threads to stand: other tests, and other programs, keep the CPUs busy."""

CONTROLLER = """
import os, signal, sys
from optpoline.process.injection_code import find_injection_code
from optpoline.process.memory import RemoteMemory
from optpoline.process.ptrace import Tracer
from optpoline.process.stop import stop_threads
from optpoline.x86.syscalls import SYS_GETPID

pid = int(sys.argv[1])
memory = RemoteMemory(pid)
code = find_injection_code(pid, memory)

def stop_once():
    with stop_threads(pid, memory=memory, code=code) as stop:
        for _ in range(3):
            assert stop.inject(SYS_GETPID) == pid

def die_at(n, when):
    # In a child: make the n-th ptrace request, and die before or after it.
    left, request = [n], Tracer._request
    def count(self, *args):
        left[0] -= 1
        if left[0] == 0 and when == "before":
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            request(self, *args)
        finally:
            if left[0] == 0:
                os.kill(os.getpid(), signal.SIGKILL)
    Tracer._request = count
    stop_once()
    os._exit(0)
"""

AT_RANDOM = (
    CONTROLLER
    + """
import random, time
rng = random.Random(5)
for _ in range(int(sys.argv[2])):
    child = os.fork()
    if child == 0:
        while True:
            stop_once()
    time.sleep(rng.uniform(0.001, 0.01))
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert status == signal.SIGKILL, status
print(sys.argv[2])
"""
)

EACH_STEP = (
    CONTROLLER
    + """
n_killed = 0
for when in ("before", "after"):
    n = 1
    while True:
        child = os.fork()
        if child == 0:
            die_at(n, when)
        _, status = os.waitpid(child, 0)
        if status == 0:
            break
        assert os.WTERMSIG(status) == signal.SIGKILL, status
        n_killed += 1
        n += 1
        with open(f"/proc/{pid}/stat") as file:
            assert file.read().rsplit(")")[1].split()[0] not in "ZXtT"
print(n_killed)
"""
)


def _start_python(program: str, *args: str) -> subprocess.Popen[str]:
    root = str(Path(optpoline.__file__).parent.parent)
    return subprocess.Popen(
        [sys.executable, "-c", program, *args],
        stdout=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": root},
    )


def _cycle(target: LiveTarget, n: int, wake: Wake = Wake.ONE_FOR_INJECTION) -> None:
    with RemoteMemory(target.pid) as memory:
        code = find_injection_code(target.pid, memory)
        for _ in range(n):
            with stop_threads(
                target.pid, memory=memory, code=code, wake=wake, timeout_ns=_TIMEOUT_NS
            ) as stop:
                assert stop.inject(SYS_GETPID) == target.pid
                addr = stop.inject(SYS_MMAP, 0, 8192, PROT_READ_WRITE, MAP_PRIVATE_ANONYMOUS, -1, 0)
                assert addr > 0
                assert memory.read(addr, 8192) == bytes(8192)
                assert stop.inject(SYS_MUNMAP, addr, 8192) == 0
            # Let it come into its call again, at ever another moment of it.
            time.sleep(0.0005)


@pytest.fixture
def controllers() -> Iterator[list[subprocess.Popen[str]]]:
    """Collect controllers; whatever still runs is killed at the end."""
    started: list[subprocess.Popen[str]] = []
    yield started
    for controller in started:
        with controller:
            controller.kill()


@pytest.mark.parametrize(
    "mode", ["spin", "nanosleep", "poll", "epoll", "futex", "rcvtimeo", "semop", "read", "short"]
)
@pytest.mark.parametrize("wake", [Wake.ONE_FOR_INJECTION, Wake.ALL])
def test_calls_do_not_notice(start_target: StartTarget, mode: str, wake: Wake) -> None:
    target = start_target("calls", mode, "3", flags=AVX)
    _cycle(target, 100, wake)
    assert target.finish().startswith("ok")


def test_signals_arrive_each_once(start_target: StartTarget) -> None:
    # SIGALRM, ignored, every millisecond; SIGUSR1 counted by sender and receiver.
    target = start_target("calls", "spin", "1", "timer", flags=AVX)
    _cycle(target, 200)
    assert target.finish().startswith("ok")


def test_static_program(start_target: StartTarget) -> None:
    target = start_target("calls", "spin", "2", flags=(*AVX, "-static"))
    _cycle(target, 20)
    assert target.finish().startswith("ok")


def test_seccomp_is_suspended(start_target: StartTarget) -> None:
    target = start_target("events", "seccomp")
    target.wait_for_state("S")
    with RemoteMemory(target.pid) as memory, stop_threads(target.pid, memory=memory) as stop:
        try:
            assert stop.inject(SYS_GETPPID) == os.getpid()
        except UnsupportedTarget as error:
            pytest.skip(f"cannot suspend seccomp: {error}")
    assert target.finish() == "ok\n"


@pytest.mark.parametrize("args", [("spin", "1"), ("spin", "1", "timer"), ("read", "1")])
def test_controller_dies_at_each_request(
    start_target: StartTarget, controllers: list[subprocess.Popen[str]], args: tuple[str, ...]
) -> None:
    target = start_target("calls", *args, flags=AVX)
    controller = _start_python(EACH_STEP, str(target.pid))
    controllers.append(controller)
    output, _ = controller.communicate(timeout=60)
    assert controller.returncode == 0, output
    assert int(output) >= 40
    assert target.finish().startswith("ok")


def test_controller_dies_at_random(
    start_target: StartTarget, controllers: list[subprocess.Popen[str]]
) -> None:
    target = start_target("calls", "spin", "2", "timer", flags=AVX)
    controller = _start_python(AT_RANDOM, str(target.pid), "100")
    controllers.append(controller)
    output, _ = controller.communicate(timeout=60)
    assert controller.returncode == 0, output
    assert output == "100\n"
    assert target.finish().startswith("ok")


@pytest.mark.parametrize("first", ["block", "lost"])
def test_calls_are_run_in_another_thread(start_target: StartTarget, first: str) -> None:
    """The one that runs has its calls end in SIGSYS, or no stack; the other sleeps in read()."""
    target = start_target("dispatch", first, "off")
    with RemoteMemory(target.pid) as memory, stop_threads(target.pid, memory=memory) as stop:
        assert stop.inject(SYS_GETPID) == target.pid
        assert stop.injector_tid != target.pid
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("selector", ["block", "allow"])
def test_all_threads_have_their_calls_dispatched(start_target: StartTarget, selector: str) -> None:
    target = start_target("dispatch", selector, "on", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with pytest.raises(UnsupportedTarget, match="can run a system call for us now") as caught:
        optpoline.attach(target.pid)
    assert "dispatched to themselves" in (caught.value.hint or "")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
