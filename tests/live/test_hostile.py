# SPDX-License-Identifier: Apache-2.0
"""Programs that shut themselves in: they are served unharmed, or refused untouched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome
from optpoline.process.leader import find_live_tid
from optpoline.process.procfs import list_tids, read_state_char, read_status
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.serving import learn_and_promote, serve
from tests.live.witness import CLI, RETPOLINE, Argument, Witness, run_cli, run_json

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to shut programs in"),
]

_TIMEOUT_S = 30.0
_FROZEN_S = 10.0
"""More than all deadlines of a session together."""

WITHOUT_SYS_ADMIN = """
import ctypes, os, sys
PR_CAPBSET_DROP, CAP_SYS_ADMIN = 24, 21
assert ctypes.CDLL(None).prctl(PR_CAPBSET_DROP, CAP_SYS_ADMIN, 0, 0, 0) == 0
os.execv(sys.argv[1], sys.argv[1:])
"""
"""Runs a command as root that may not suspend seccomp, as in most containers."""


@contextmanager
def _unharmed(target: LiveTarget) -> Iterator[None]:
    """Check that a block leaves a program as it was, and that it goes on right."""
    shown = find_live_tid(target.pid)
    before = Witness.of(shown)
    yield
    before.check(shown)
    assert target.ask("still there?").startswith("rounds ")
    assert target.finish().startswith("wrong 0 rounds")


def _run_unprivileged(*args: Argument) -> subprocess.CompletedProcess[str]:
    """Run one command of ours without CAP_SYS_ADMIN."""
    return subprocess.run(
        [sys.executable, "-c", WITHOUT_SYS_ADMIN, *CLI, *map(str, args)],
        capture_output=True,
        text=True,
        timeout=_TIMEOUT_S,
        check=False,
    )


@pytest.mark.parametrize(
    "how",
    [
        *("strict", "kills", "refuses", "half", "mdwe", "systemd"),
        *("nobody", "nodump", "leader"),
    ],
)
def test_served_unharmed(start_target: StartTarget, how: str) -> None:
    target = start_target("confined", how, flags=RETPOLINE)
    _check_confined(target, how)
    with _unharmed(target):
        for _ in range(3):
            serve(target)


def _check_confined(target: LiveTarget, how: str) -> None:
    """Check that a program is what its name says, lest a test show nothing."""
    deadline = time.monotonic() + _TIMEOUT_S
    wanted = {"strict": 1, "kills": 2, "refuses": 2, "half": 2, "systemd": 2}.get(how, 0)
    while True:
        statuses = [read_status(target.pid, tid=tid) for tid in list_tids(target.pid)]
        is_ready = max(status.seccomp for status in statuses) == wanted
        if how == "leader":
            is_ready = [status.state == "Z" for status in statuses] == [True, False]
        if how == "nobody":
            is_ready = statuses[0].uids == (65534,) * 4
        if is_ready:
            return
        assert time.monotonic() < deadline, statuses
        time.sleep(0.001)


def test_served_in_another_root(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("confined", "root", str(tmp_path), flags=RETPOLINE)
    assert os.readlink(f"/proc/{target.pid}/root") == str(tmp_path)
    with _unharmed(target):
        serve(target)


# --- refused


@pytest.mark.parametrize("how", ["strict", "kills", "refuses", "systemd"])
def test_seccomp_that_cannot_be_suspended(start_target: StartTarget, how: str) -> None:
    target = start_target("confined", how, flags=RETPOLINE)
    _check_confined(target, how)
    with _unharmed(target):
        for verb in ("attach", "doctor"):
            done = _run_unprivileged(verb, target.pid)
            assert done.returncode == 6, (done.stdout, done.stderr)
            assert "is under seccomp" in " ".join((done.stdout + done.stderr).split())


def test_calls_are_run_in_a_thread_without_seccomp(start_target: StartTarget) -> None:
    target = start_target("confined", "half", flags=RETPOLINE)
    _check_confined(target, "half")
    with _unharmed(target):
        done = _run_unprivileged(
            "attach", "--duration", "0.3", "--learn-seconds", "0.1", target.pid
        )
        assert done.returncode == 0, done.stderr
        assert "restored" in done.stderr


def test_locked_memory(start_target: StartTarget) -> None:
    target = start_target("confined", "memlock", flags=RETPOLINE)
    with _unharmed(target):
        error = run_json("attach", "--duration", "0.2", target.pid, status=7)["error"]
        assert "limit of locked memory" in error["hint"]


def test_traced_by_strace(start_target: StartTarget) -> None:
    target = start_target("confined", "half", flags=RETPOLINE)
    _check_confined(target, "half")
    (worker,) = set(list_tids(target.pid)) - {target.pid}
    command = ["strace", "-q", "-e", "trace=none", "-o", os.devnull, "-p"]
    try:
        # One thread only, and not the first: that is enough to be in its way.
        tracer = subprocess.Popen([*command, str(worker)])
    except FileNotFoundError:
        pytest.skip("strace is not installed")
    with _unharmed(target), tracer:
        try:
            deadline = time.monotonic() + _TIMEOUT_S
            while not read_status(target.pid, tid=worker).tracer_pid:
                assert time.monotonic() < deadline
                time.sleep(0.001)
            done = run_cli("attach", target.pid, status=5)
            assert f"process {tracer.pid} (strace)" in done.stderr.replace("\n", " ")
        finally:
            tracer.terminate()


# --- stopped


def test_stopped_by_a_signal(start_target: StartTarget) -> None:
    """It is served as far as it goes, and its parent is told of no stop of ours."""
    target = start_target("confined", "free", flags=RETPOLINE)
    with _unharmed(target):
        os.kill(target.pid, signal.SIGSTOP)
        target.wait_for_state("T")
        changes = os.WSTOPPED | os.WCONTINUED
        assert os.waitid(os.P_PID, target.pid, changes) is not None
        assert "stopped by a signal" in run_cli("doctor", target.pid).stdout
        with optpoline.attach(target.pid) as session:
            session.learn(0.1)
            assert session.promote() == 0
            assert read_state_char(target.pid, target.pid) == "T"
        assert read_state_char(target.pid, target.pid) == "T"
        assert os.waitid(os.P_PID, target.pid, changes | os.WNOHANG) is None
        os.kill(target.pid, signal.SIGCONT)
        told = os.waitid(os.P_PID, target.pid, changes)
        assert told is not None
        assert told.si_status == signal.SIGCONT


class _Group:
    """A control group of our own that can be frozen."""

    def __init__(self, path: Path, switch: str, frozen: str, thawed: str) -> None:
        """Make it."""
        self.path = path
        self._switch, self._frozen, self._thawed = path / switch, frozen, thawed
        path.mkdir()

    def freeze(self, pid: int) -> None:
        """Take a process in and freeze it."""
        (self.path / "cgroup.procs").write_text(str(pid))
        self._switch.write_text(self._frozen)
        deadline = time.monotonic() + _TIMEOUT_S
        while "FROZEN" not in self._switch.read_text() and "frozen 1" not in self._events():
            assert time.monotonic() < deadline
            time.sleep(0.001)

    def thaw(self) -> None:
        """Let it run again."""
        self._switch.write_text(self._thawed)

    def _events(self) -> str:
        """Return the events file of version 2."""
        events = self.path / "cgroup.events"
        return events.read_text() if events.exists() else ""

    def remove(self, pid: int) -> None:
        """Thaw it, let the process out and remove it."""
        self.thaw()
        (self.path.parent / "cgroup.procs").write_text(str(pid))
        self.path.rmdir()


def _make_group(version: int) -> _Group:
    """Make a group below wherever the machine has control groups of a version."""
    name = f"optpoline-test-{os.getpid()}"
    kind, words = (
        ("cgroup2", ("cgroup.freeze", "1", "0"))
        if version == 2
        else ("cgroup", ("freezer.state", "FROZEN", "THAWED"))
    )
    for line in Path("/proc/mounts").read_text().splitlines():
        _, where, found, options, *_ = line.split()
        if found == kind and (version == 2 or "freezer" in options.split(",")):
            try:
                return _Group(Path(where) / name, *words)
            except OSError as error:
                pytest.skip(f"cannot make a control group in {where}: {error.strerror}")
    pytest.skip(f"no freezer of control groups version {version} is mounted")


def _check_told_frozen(target: LiveTarget, *verbs: str) -> None:
    """Check that commands refuse a frozen program by name."""
    for verb in verbs:
        done = run_cli(verb, target.pid, status=6)
        assert "is frozen by its control group" in " ".join((done.stdout + done.stderr).split())


@pytest.mark.parametrize("version", [1, 2])
def test_frozen(start_target: StartTarget, version: int) -> None:
    """A frozen program keeps nobody waiting; what it was promoted to is undone after it thaws."""
    group = _make_group(version)
    target = start_target("confined", "half", flags=RETPOLINE)
    with _unharmed(target):
        try:
            group.freeze(target.pid)
            _check_told_frozen(target, "attach", "doctor")
            group.thaw()
            with optpoline.attach(target.pid) as session:
                learn_and_promote(session)
                group.freeze(target.pid)
                begin_s = time.monotonic()
                session.watch(0.2)
                # Its text is put back; nobody can run the call that unmaps the arena.
                result = session.detach()
                assert result.outcome is DetachOutcome.ARENA_LEFT
                assert result.restored == 1
                assert time.monotonic() - begin_s < _FROZEN_S
            _check_told_frozen(target, "detach")
            group.thaw()
            run_cli("detach", target.pid)
        finally:
            group.remove(target.pid)
