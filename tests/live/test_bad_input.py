# SPDX-License-Identifier: Apache-2.0
"""What cannot be done ends with its exit status, a reason, and an untouched target."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.model import Refusal, Site
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_status
from optpoline.process.ptrace import Tracer
from tests.live.conftest import BuildTarget, LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Argument, Witness, arena_mappings, run_cli, run_json

pytestmark = pytest.mark.live

NOBODY = 65534

AS_NOBODY = """
import os, sys
import optpoline, optpoline.controller.session, optpoline.controller.summaries
import optpoline.cli.attach, optpoline.cli.detach, optpoline.cli.doctor
import optpoline.cli.sites, optpoline.cli.status
from optpoline.cli.main import main
from optpoline.process import permissions
os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sys.exit(main(sys.argv[1:]))
"""

LOOP_32_BIT = """
void _start(void) { for (;;) __asm__ volatile("int $0x80" : : "a"(29)); }
"""

VERBS = ("attach", "doctor", "sites", "status", "detach")


def _check_error(kind: str, status: int, *args: Argument) -> str:
    """Run a command that must fail; return what it says."""
    error = run_json(*args, status=status)["error"]
    assert (error["kind"], error["exit_code"]) == (kind, status)
    words = run_cli(*args, status=status)
    assert words.stdout == ""
    assert error["message"] in words.stderr.replace("\n", " ")
    return f"{error['message']} {error['hint']}"


@contextmanager
def _untouched(target: LiveTarget) -> Iterator[None]:
    """Check that a block leaves a target as it is, and that it goes on."""
    before = Witness.of(target.pid)
    yield
    before.check(target.pid)
    assert target.ask("still there?")
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize(
    "args",
    [
        ("attach",),
        ("attach", "x"),
        ("attach", "0"),
        ("attach", "-1"),
        ("attach", "1", "2"),
        ("attach", "--duration", "-1", "1"),
        ("attach", "--duration", "nan", "1"),
        ("status",),
        ("detach", "0x"),
        ("sites",),
        ("frobnicate",),
        (),
    ],
)
def test_usage(args: tuple[str, ...]) -> None:
    assert run_cli(*args, status=2).stdout == ""


def test_no_such_process() -> None:
    with subprocess.Popen(["true"]) as process:
        pid = process.pid
    for verb in ("attach", "sites", "status", "detach"):
        assert str(pid) in _check_error("target_gone", 4, verb, pid)
    run_cli("doctor", pid, status=4)


def test_zombie() -> None:
    with subprocess.Popen(["true"]) as process:
        os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
        for verb in ("attach", "sites", "status", "check", "detach"):
            assert "zombie" in _check_error("target_gone", 4, verb, process.pid)
        run_cli("doctor", process.pid, status=4)


def test_kernel_thread() -> None:
    if not Path("/proc/2/status").exists() or read_status(2).name != "kthreadd":
        pytest.skip("no kernel thread to be seen from this pid namespace")
    run_cli("doctor", 2, status=6)
    for verb in ("attach", "sites", "status", "check", "detach"):
        assert "kernel thread" in _check_error("unsupported", 6, verb, 2)


def test_32_bit(tmp_path: Path) -> None:
    source, path = tmp_path / "loop.c", tmp_path / "loop"
    source.write_text(LOOP_32_BIT)
    command = ["gcc", "-m32", "-nostdlib", "-static", "-o", str(path), str(source)]
    if subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("gcc cannot build 32-bit programs")
    try:
        process = subprocess.Popen([str(path)])
    except OSError:
        pytest.skip("the kernel does not run 32-bit programs")
    with process:
        try:
            for verb in ("attach", "sites"):
                assert "32-bit" in _check_error("unsupported", 6, verb, process.pid)
        finally:
            process.kill()


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to become somebody else")
def test_other_user(start_target: StartTarget) -> None:
    target = start_target("promote", flags=RETPOLINE)
    with _untouched(target):
        for verb in VERBS:
            done = subprocess.run(
                [sys.executable, "-c", AS_NOBODY, verb, str(target.pid)],
                capture_output=True,
                text=True,
                check=False,
            )
            assert done.returncode == 5, (verb, done.stdout, done.stderr)
            assert "root" in done.stdout + done.stderr, (verb, done.stdout, done.stderr)


def test_traced_already(start_target: StartTarget) -> None:
    target = start_target("promote", flags=RETPOLINE)
    with _untouched(target):
        tracer = Tracer()
        tracer.seize(target.pid)
        for verb in ("attach", "doctor"):
            done = run_cli(verb, target.pid, status=5)
            assert f"process {os.getpid()}" in " ".join((done.stderr + done.stdout).split())
        tracer.interrupt(target.pid)
        while tracer.poll(target.pid) is None:
            pass
        tracer.detach(target.pid)


def test_no_sites(start_target: StartTarget) -> None:
    target = start_target("promote", flags=("-O2",))
    with _untouched(target):
        said = _check_error("no_sites", 3, "attach", target.pid)
        assert "plain indirect branches" in said
        assert "not built with retpolines" in _check_error("no_sites", 3, "sites", target.pid)
        assert run_json("status", target.pid)["left_behind"] is None


def test_second_controller(start_target: StartTarget) -> None:
    target = start_target("promote", flags=RETPOLINE)
    with _untouched(target), optpoline.attach(target.pid) as session:
        session.learn(0.4)
        session.promote()
        for verb in ("attach", "detach"):
            assert "another" in _check_error("refused", 7, verb, target.pid)
        assert run_json("status", target.pid)["left_behind"]["controller_alive"] is True


# --- limits of the target


def _refused_arena(target: LiveTarget) -> str:
    """Attach, which must fail for want of an arena; return the reason."""
    return _check_error("refused", 7, "attach", "--duration", "0.2", target.pid)


def test_no_address_space(start_target: StartTarget) -> None:
    target = start_target("life", "rest", flags=RETPOLINE)
    size = int(Path(f"/proc/{target.pid}/statm").read_text().split()[0]) * 4096
    with _untouched(target):
        resource.prlimit(target.pid, resource.RLIMIT_AS, (size + (1 << 20), size + (1 << 20)))
        assert "address space" in _refused_arena(target)


def test_no_file(start_target: StartTarget) -> None:
    target = start_target("promote", flags=RETPOLINE)
    n_open = len(os.listdir(f"/proc/{target.pid}/fd"))
    with _untouched(target):
        resource.prlimit(target.pid, resource.RLIMIT_NOFILE, (n_open, n_open))
        assert "open files" in _refused_arena(target)


@pytest.mark.parametrize("flags", [("-no-pie", "-fno-pie"), ("-pie", "-fPIE")])
def test_no_room_within_reach(start_target: StartTarget, flags: tuple[str, ...]) -> None:
    target = start_target("life", "spin", flags=(*RETPOLINE, *flags))
    assert target.ask("wall").startswith("wall of")
    with _untouched(target):
        assert "within reach" in _refused_arena(target)


# --- bytes that are not what they should be


def _find_cold(session: optpoline.Session) -> Site:
    """Return the site that is never reached."""
    (site,) = (site for site in session.sites if site.function == "cold")
    return site


def _write(target: LiveTarget, addr: int, data: bytes) -> None:
    """Be another patcher."""
    with RemoteMemory(target.pid) as memory:
        memory.write(addr, data)


def test_breakpoint_before_attach(start_target: StartTarget) -> None:
    target = start_target("life", "spin", flags=RETPOLINE)
    with optpoline.attach(target.pid) as session:
        site = _find_cold(session)
    _write(target, site.addr, b"\xcc")
    with _untouched(target), optpoline.attach(target.pid) as session:
        session.learn(0.4)
        assert session.promote() > 0
        (found,) = (s for s in session.summary().sites if s.address == site.addr)
        assert found.state is SiteState.REFUSED
        assert found.refusal == Refusal.FOREIGN_BYTES.value
        assert session.detach().outcome is DetachOutcome.CLEAN


OTHERS = {"breakpoint": (0, b"\xcc"), "displacement": (1, b"\x11\x22\x33\x04")}


@pytest.mark.parametrize("what", list(OTHERS))
@pytest.mark.parametrize("how", ["baseline", "learning"])
def test_another_patcher_during_a_session(start_target: StartTarget, how: str, what: str) -> None:
    target = start_target("life", "spin", flags=RETPOLINE)
    before = Witness.of(target.pid)
    off, data = OTHERS[what]
    with optpoline.attach(target.pid) as session:
        site = _find_cold(session)
        (record,) = (r for r in session.records if r.site == site)
        if how == "learning":
            session.learn(0.4)
            # The breakpoint's owner keeps what was there: our branch.
            with RemoteMemory(target.pid) as memory:
                owned = memory.read(site.addr + off, len(data))
            _write(target, site.addr + off, data)
        else:
            owned = site.code[off : off + len(data)]
            _write(target, site.addr + off, data)
            session.learn(0.4)
        assert session.promote() > 0
        assert record.state is SiteState.REFUSED
        assert record.refusal is Refusal.FOREIGN_BYTES
        result = session.detach()
    assert before.changed_bytes(target.pid).keys() <= set(range(site.addr, site.addr + 5))
    with RemoteMemory(target.pid) as memory:
        assert memory.read(site.addr + off, len(data)) == data
    if how == "learning":
        assert result.outcome is DetachOutcome.FOREIGN_BYTES
        assert result.foreign == (site.addr,)
        # Once the owner puts back what it took for the original, the arena is needed.
        assert arena_mappings(target.pid)
        if what == "breakpoint":
            assert run_json("detach", target.pid, status=7)["detach"]["outcome"] == "foreign_bytes"
    else:
        assert result.outcome is DetachOutcome.CLEAN
        assert arena_mappings(target.pid) == []
    _write(target, site.addr + off, owned)
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_report_cannot_be_written(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("promote", flags=RETPOLINE)
    existing = tmp_path / "report.json"
    existing.write_text("mine")
    with _untouched(target):
        run_cli("attach", "--json", existing, target.pid, status=2)
        run_cli("attach", "--json", tmp_path / "none" / "x.json", target.pid, status=1)
    assert existing.read_text() == "mine"


def test_file_without_sites(build_target: BuildTarget) -> None:
    run_cli("sites", build_target("promote", "-O2"), status=3)
    run_cli("sites", build_target("promote", *RETPOLINE))
    run_cli("sites", "/etc/passwd", status=6)
    run_cli("sites", "/nonexistent", status=1)
