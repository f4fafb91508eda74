# SPDX-License-Identifier: Apache-2.0
"""The rules that decide about an attach, on fake /proc trees."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from optpoline.errors import AttachError, PermissionDenied, ProcessGone, UnsupportedTarget
from optpoline.process.checks import Check, CheckStatus, Failure
from optpoline.process.permissions import (
    check_attachable,
    check_has_program,
    diagnose,
    explain_denied,
    explain_untraceable,
    find_tracer,
)

PID, SELF, SHELL, TRACER = 4711, 900, 800, 321
UID = os.getuid()
OTHER_UID = UID + 1
CAP_SYS_PTRACE, CAP_SYS_ADMIN = 1 << 19, 1 << 21
GID = 77


def elf_header(elf_class: int = 2, data: int = 1, machine: int = 62) -> bytes:
    order = "big" if data == 2 else "little"
    kind = (3).to_bytes(2, "big" if order == "big" else "little")
    return (
        b"\x7fELF"
        + bytes([elf_class, data, 1, 0])
        + bytes(8)
        + kind
        + machine.to_bytes(2, "big" if order == "big" else "little")
        + bytes(44)
    )


@dataclass
class FakeProc:
    """A /proc with ourselves, our shell and one target, all of the same user."""

    root: Path
    ours: dict[str, str] = field(default_factory=dict)
    theirs: dict[str, str] = field(default_factory=dict)
    threads: dict[int, dict[str, str]] = field(default_factory=dict)
    """What is different in the status of threads, by id; none: one thread that is not listed."""
    header: bytes = field(default_factory=elf_header)
    limits: str = "Max address space         unlimited            unlimited            bytes\n"

    @property
    def sys_root(self) -> Path:
        return self.root / "sys"

    def set_sysctl(self, name: str, value: str) -> None:
        path = self.sys_root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(value + "\n")

    def write_status(self, name: str, fields: dict[str, str]) -> None:
        folder = self.root / name
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "status").write_text("".join(f"{k}:\t{v}\n" for k, v in fields.items()))

    def write(self) -> None:
        ids = {"Uid": "\t".join([str(UID)] * 4), "Gid": "\t".join([str(GID)] * 4)}
        caps = {"CapPrm": "0", "CapEff": "0"}
        ours = {"Name": "optpoline", "Pid": str(SELF), "PPid": str(SHELL), **ids, **caps}
        theirs = {
            "Name": "lua",
            "State": "R (running)",
            "Tgid": str(PID),
            "Pid": str(PID),
            "PPid": "1",
            "TracerPid": "0",
            "VmSize": "3000 kB",
            "Seccomp": "0",
            **ids,
            **caps,
        }
        self.write_status("self", ours | self.ours)
        self.write_status(str(PID), {k: v for k, v in (theirs | self.theirs).items() if v})
        for tid, fields in self.threads.items():
            status = theirs | {"Pid": str(tid)} | fields
            name = f"{PID}/task/{tid}"
            self.write_status(name, {k: v for k, v in status.items() if v})
            state = status["State"][:1]
            (self.root / name / "stat").write_text(f"{tid} (lua) {state} 1" + " 0" * 40 + "\n")
        (self.root / str(PID) / "exe").write_bytes(self.header)
        (self.root / str(PID) / "limits").write_text("Limit  Soft  Hard  Units\n" + self.limits)

    def failure(self) -> AttachError | None:
        self.write()
        return diagnose(PID, self.root, self.sys_root).error()

    def check(self, name: str) -> Check:
        self.write()
        checks = diagnose(PID, self.root, self.sys_root).checks
        return next(check for check in checks if check.name == name)


@pytest.fixture
def proc(tmp_path: Path) -> FakeProc:
    return FakeProc(root=tmp_path)


def uids(uid: int) -> str:
    return "\t".join([str(uid)] * 4)


def test_own_process_is_attachable(proc: FakeProc) -> None:
    assert proc.failure() is None
    check_attachable(PID, proc.root, proc.sys_root)


def test_no_such_process(tmp_path: Path) -> None:
    with pytest.raises(ProcessGone, match="no process 5555") as caught:
        check_attachable(5555, tmp_path, tmp_path)
    assert caught.value.exit_code == 4
    assert caught.value.pid == 5555


def test_zombie_is_gone_and_its_parent_named(proc: FakeProc) -> None:
    proc.theirs = {"State": "Z (zombie)", "PPid": "44", "VmSize": ""}
    error = proc.failure()
    assert isinstance(error, ProcessGone)
    assert "zombie" in error.message
    assert "process 44" in error.message


@pytest.mark.parametrize("fields", [{"Kthread": "1"}, {"VmSize": ""}])
def test_kernel_thread(proc: FakeProc, fields: dict[str, str]) -> None:
    proc.theirs = fields
    error = proc.failure()
    assert isinstance(error, UnsupportedTarget)
    assert "kernel thread" in error.message


def test_thread_that_is_no_process(proc: FakeProc) -> None:
    proc.theirs = {"Tgid": "4700"}
    error = proc.failure()
    assert isinstance(error, UnsupportedTarget)
    assert error.hint == "use PID 4700"


def test_ourselves(proc: FakeProc) -> None:
    proc.ours = {"Pid": str(PID)}
    assert isinstance(proc.failure(), UnsupportedTarget)


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (elf_header(elf_class=1, machine=3), "32-bit program (i386)"),
        (elf_header(elf_class=1, machine=62), "32-bit program (x86-64)"),
        (elf_header(machine=183), "AArch64"),
        (elf_header(data=2, machine=22), "S390"),
        (elf_header(machine=999), "ELF machine 999"),
        (b"#!/bin/sh\necho too short for a header\n", "not an ELF file"),
        (b"\x7fELF", "not an ELF file"),
    ],
)
def test_architecture(proc: FakeProc, header: bytes, words: str) -> None:
    proc.header = header
    error = proc.failure()
    assert isinstance(error, UnsupportedTarget)
    assert words in error.message


def test_architecture_outranks_permission(proc: FakeProc) -> None:
    proc.header = elf_header(machine=183)
    proc.theirs = {"TracerPid": "5"}
    error = proc.failure()
    assert isinstance(error, UnsupportedTarget)
    assert "doctor" in str(error)


def test_other_user(proc: FakeProc) -> None:
    proc.ours = {"Uid": uids(OTHER_UID)}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert f"belongs to uid {UID}, we are uid {OTHER_UID}" in error.message
    assert "CAP_SYS_PTRACE" in error.message
    assert error.hint is not None
    assert "sudo" in error.hint


def test_other_user_with_capability(proc: FakeProc) -> None:
    proc.ours = {"Uid": uids(OTHER_UID), "CapEff": f"{CAP_SYS_PTRACE:x}"}
    assert proc.failure() is None


def test_other_user_s_memory_file_wants_a_capability_of_its_own(proc: FakeProc) -> None:
    proc.ours = {"Uid": uids(OTHER_UID), "CapEff": f"{CAP_SYS_PTRACE:x}"}
    proc.write()
    (proc.root / str(PID) / "mem").touch()
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert error.message == f"/proc/{PID}/mem belongs to uid {UID}, and we have no CAP_DAC_OVERRIDE"
    proc.ours["CapEff"] = f"{CAP_SYS_PTRACE | 1 << 1:x}"
    assert proc.failure() is None


def test_the_real_uid_counts_not_the_effective(proc: FakeProc) -> None:
    proc.ours = {"Uid": f"{OTHER_UID}\t{UID}\t{UID}\t{UID}"}
    assert isinstance(proc.failure(), PermissionDenied)


def test_setuid_target_shows_all_its_ids(proc: FakeProc) -> None:
    proc.theirs = {"Uid": f"{UID}\t{OTHER_UID}\t{OTHER_UID}\t{OTHER_UID}"}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert f"uid {UID}, {OTHER_UID}" in error.message


def test_other_group(proc: FakeProc) -> None:
    proc.theirs = {"Gid": uids(GID + 1)}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert f"gid {GID + 1}" in error.message


def test_root_in_a_container_is_told_about_the_container(proc: FakeProc) -> None:
    proc.ours = {"Uid": f"{OTHER_UID}\t0\t0\t0"}
    error = proc.failure()
    assert error is not None
    assert error.hint is not None
    assert "--cap-add SYS_PTRACE" in error.hint


def test_target_with_more_capabilities(proc: FakeProc) -> None:
    proc.theirs = {"CapPrm": "2000"}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert "0x2000" in error.message
    proc.ours = {"CapPrm": "2000"}
    assert proc.failure() is None


def test_not_dumpable(proc: FakeProc) -> None:
    # The directory belongs to the user of the test, the process says it runs as another.
    proc.theirs = proc.ours = {"Uid": uids(OTHER_UID)}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert "not dumpable" in error.message
    proc.ours = {"Uid": uids(OTHER_UID), "CapEff": f"{CAP_SYS_PTRACE:x}"}
    assert proc.failure() is None


@pytest.mark.parametrize(
    ("scope", "cap", "allowed"),
    [
        (0, 0, True),
        (1, 0, False),
        (2, 0, False),
        (3, 0, False),
        (1, CAP_SYS_PTRACE, True),
        (2, CAP_SYS_PTRACE, True),
        (3, CAP_SYS_PTRACE, False),
    ],
)
def test_yama(proc: FakeProc, scope: int, cap: int, allowed: bool) -> None:
    proc.set_sysctl("kernel/yama/ptrace_scope", str(scope))
    proc.ours = {"CapEff": f"{cap:x}"}
    error = proc.failure()
    if allowed:
        assert error is None
        return
    assert isinstance(error, PermissionDenied)
    assert f"kernel.yama.ptrace_scope is {scope}" in error.message
    assert error.hint is not None
    if scope == 3:
        assert "reboot" in str(error)
        assert "sysctl kernel" not in error.hint
    else:
        assert "sudo sysctl kernel.yama.ptrace_scope=0" in error.hint


def test_yama_lets_us_trace_descendants(proc: FakeProc) -> None:
    proc.set_sysctl("kernel/yama/ptrace_scope", "1")
    proc.write_status("600", {"Pid": "600", "PPid": str(SELF)})
    proc.theirs = {"PPid": "600"}
    assert proc.failure() is None


def test_yama_with_a_loop_of_parents_ends(proc: FakeProc) -> None:
    proc.set_sysctl("kernel/yama/ptrace_scope", "1")
    proc.write_status("600", {"Pid": "600", "PPid": "601"})
    proc.write_status("601", {"Pid": "601", "PPid": "600"})
    proc.theirs = {"PPid": "600"}
    assert isinstance(proc.failure(), PermissionDenied)


def test_tracer_is_named(proc: FakeProc) -> None:
    proc.write_status(str(TRACER), {"Name": "gdb"})
    (proc.root / str(TRACER) / "comm").write_text("gdb\n")
    proc.theirs = {"TracerPid": str(TRACER)}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert f"already traced by process {TRACER} (gdb)" in error.message


def test_who_traces_is_found(proc: FakeProc) -> None:
    proc.write()
    assert find_tracer(PID, proc.root) is None
    proc.theirs = {"TracerPid": str(TRACER)}
    proc.write()
    assert find_tracer(PID, proc.root) == f"process {TRACER} (name unknown)"
    assert find_tracer(5555, proc.root) is None


def test_a_debugger_that_came_counts_before_what_kind_of_process_it_is(proc: FakeProc) -> None:
    denied = PermissionDenied("thread 1 cannot be traced")
    proc.write()
    assert explain_untraceable(PID, denied, proc.root, proc.sys_root) is denied
    proc.theirs = {"Seccomp": "2", "TracerPid": str(TRACER)}
    assert isinstance(proc.failure(), UnsupportedTarget)
    error = explain_untraceable(PID, denied, proc.root, proc.sys_root)
    assert isinstance(error, PermissionDenied)
    assert f"is already traced by process {TRACER}" in error.message


def test_what_cannot_be_attached_to_may_be_looked_at(proc: FakeProc) -> None:
    proc.theirs = {"Seccomp": "2", "TracerPid": str(TRACER)}
    assert proc.failure() is not None
    check_has_program(PID, proc.root, proc.sys_root)


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"Kthread": "1"}, "kernel thread"),
        ({"State": "Z (zombie)", "VmSize": ""}, "zombie"),
        ({"Tgid": "77"}, "a thread of process 77"),
    ],
)
def test_what_has_no_program_is_said_as_at_attach(
    proc: FakeProc, fields: dict[str, str], words: str
) -> None:
    proc.theirs = fields
    wanted = proc.failure()
    assert wanted is not None
    with pytest.raises(AttachError, match=words) as caught:
        check_has_program(PID, proc.root, proc.sys_root)
    assert str(caught.value) == str(wanted)
    assert type(caught.value) is type(wanted)


def test_seccomp_strict_needs_an_unfiltered_admin(proc: FakeProc) -> None:
    proc.theirs = {"Seccomp": "1"}
    assert isinstance(proc.failure(), UnsupportedTarget)
    proc.ours = {"CapEff": f"{CAP_SYS_ADMIN:x}", "Seccomp": "2"}
    assert isinstance(proc.failure(), UnsupportedTarget)
    proc.ours = {"CapEff": f"{CAP_SYS_ADMIN:x}", "Seccomp": "0"}
    assert proc.failure() is None


def test_seccomp_filter_needs_one_too(proc: FakeProc) -> None:
    proc.theirs = {"Seccomp": "2"}
    error = proc.failure()
    assert isinstance(error, UnsupportedTarget)
    assert "is under seccomp (a filter is set)" in error.message
    proc.ours = {"CapEff": f"{CAP_SYS_ADMIN:x}", "Seccomp": "0"}
    assert proc.failure() is None
    assert proc.check("seccomp").status is CheckStatus.WARN


def test_a_thread_without_seccomp_is_enough(proc: FakeProc) -> None:
    proc.theirs = {"Seccomp": "2"}
    proc.threads = {PID: {"Seccomp": "2"}, PID + 1: {"Seccomp": "0"}}
    assert proc.failure() is None
    check = proc.check("seccomp")
    assert check.status is CheckStatus.WARN
    assert check.sentence.startswith("1 of its 2 threads")


def test_shadow_stacks(proc: FakeProc) -> None:
    proc.theirs = {"x86_Thread_features": "shstk wrss"}
    error = proc.failure()
    assert isinstance(error, UnsupportedTarget)
    assert "hardware shadow stacks" in error.message
    proc.threads = {PID: proc.theirs, PID + 1: {"x86_Thread_features": ""}}
    assert proc.failure() is None
    assert proc.check("shadow stack").status is CheckStatus.WARN


def test_tracer_of_one_thread_is_named(proc: FakeProc) -> None:
    proc.threads = {PID: {"TracerPid": "0"}, PID + 1: {"TracerPid": str(TRACER)}}
    error = proc.failure()
    assert isinstance(error, PermissionDenied)
    assert f"already traced by process {TRACER}" in error.message


def test_first_thread_has_exited(proc: FakeProc) -> None:
    """The process is what its other threads are; /proc/PID tells no more."""
    live = PID + 1
    proc.theirs = {"State": "Z (zombie)", "VmSize": "", "Threads": "2"}
    proc.threads = {PID: proc.theirs, live: {}}
    proc.write()
    # Of the thread that lives there is a directory, though none is listed.
    (proc.root / str(live)).symlink_to(proc.root / str(PID) / "task" / str(live))
    (proc.root / str(PID) / "exe").rename(proc.root / str(live) / "exe")
    (proc.root / str(PID) / "limits").rename(proc.root / str(live) / "limits")
    diagnosis = diagnose(PID, proc.root, proc.sys_root)
    assert diagnosis.error() is None
    assert diagnosis.checks[0].sentence.startswith(f"process {PID} ")


def test_exiting_is_gone_and_no_kernel_thread(proc: FakeProc) -> None:
    proc.theirs = {"Kthread": "0", "VmSize": ""}
    error = proc.failure()
    assert isinstance(error, ProcessGone)
    assert "is exiting" in error.message


def test_frozen(proc: FakeProc) -> None:
    proc.write()
    group = proc.root / "groups" / "a"
    group.mkdir(parents=True)
    (group / "cgroup.events").write_text("populated 1\nfrozen 1\n")
    (proc.root / str(PID) / "cgroup").write_text("0::/a\n")
    mount = f"30 25 0:26 / {proc.root / 'groups'} rw - cgroup2 cgroup2 rw\n"
    (proc.root / "self" / "mountinfo").write_text(mount)
    error = diagnose(PID, proc.root, proc.sys_root).error()
    assert isinstance(error, UnsupportedTarget)
    assert "frozen by its control group /a" in error.message
    assert error.hint == "thaw it first"


def test_limited_address_space_is_a_warning(proc: FakeProc) -> None:
    proc.limits = "Max address space         104857600            unlimited            bytes\n"
    check = proc.check("address space")
    assert check.status is CheckStatus.WARN
    assert "104857600" in check.sentence


def test_stopped_process_is_a_warning(proc: FakeProc) -> None:
    proc.theirs = {"State": "T (stopped)"}
    check = proc.check("kind")
    assert check.status is CheckStatus.WARN
    assert check.advice is not None
    assert f"kill -CONT {PID}" in check.advice


@pytest.mark.parametrize(("ours", "status"), [(1, CheckStatus.OK), (2, CheckStatus.WARN)])
def test_user_namespace(proc: FakeProc, ours: int, status: CheckStatus) -> None:
    proc.write()
    for name, number in (("self", ours), (str(PID), 1)):
        (proc.root / name / "ns").mkdir()
        (proc.root / name / "ns" / "user").symlink_to(f"user:[{number}]")
    checks = diagnose(PID, proc.root, proc.sys_root).checks
    assert next(one for one in checks if one.name == "user namespace").status is status


def test_several_reasons_point_to_the_doctor(proc: FakeProc) -> None:
    proc.set_sysctl("kernel/yama/ptrace_scope", "2")
    proc.theirs = {"TracerPid": "5"}
    error = proc.failure()
    assert error is not None
    assert error.hint is not None
    assert f"optpoline doctor {PID}` lists 1 more reason" in error.hint


def test_refusal_without_a_visible_rule(proc: FakeProc) -> None:
    proc.write()
    error = explain_denied(PID, proc.root, proc.sys_root)
    assert isinstance(error, PermissionDenied)
    assert "SELinux" in str(error)
    assert "seccomp" in str(error)


def test_refusal_with_a_visible_rule(proc: FakeProc) -> None:
    proc.theirs = {"TracerPid": "5"}
    proc.write()
    assert "already traced" in str(explain_denied(PID, proc.root, proc.sys_root))


def test_status_and_failure_go_together() -> None:
    with pytest.raises(ValueError, match="disagree"):
        Check(name="x", status=CheckStatus.FAIL, sentence="y")
    with pytest.raises(ValueError, match="disagree"):
        Check(name="x", status=CheckStatus.OK, sentence="y", failure=Failure.GONE)


def test_hostile_name_is_kept_apart_from_fields(proc: FakeProc) -> None:
    # The kernel escapes newlines in Name; a colon in it must not hide another field.
    proc.theirs = {"Name": "a:b\\nTracerPid:"}
    assert proc.failure() is None


def test_real_proc_of_ourselves() -> None:
    error = diagnose(os.getpid()).error()
    assert isinstance(error, UnsupportedTarget)
    assert "itself" in error.message
