# SPDX-License-Identifier: Apache-2.0
"""Say whether a process may be attached to, and if not, exactly which rule forbids it.

The kernel answers every refused ``ptrace`` with the same EPERM. The rules behind
it (``__ptrace_may_access`` and the security modules) are all visible in ``/proc``,
so each becomes one ``Check`` here, in the order in which the kernel would ask.

Invariants: everything is read, nothing is written, no process is touched.
Non-goals: what the machine offers in general, and whether there is a site.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from optpoline.errors import AttachError, PermissionDenied, ProcessGone, UnsupportedTarget

__all__ = [
    "Check",
    "CheckStatus",
    "Diagnosis",
    "Failure",
    "check_attachable",
    "diagnose",
    "explain_denied",
]

PROC_ROOT = Path("/proc")
SYS_ROOT = Path("/proc/sys")

# include/uapi/linux/capability.h
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21

# Seccomp field of /proc/PID/status, Documentation/filesystems/proc.rst
SECCOMP_STRICT = 1

# <elf.h>: the machine we can write code for, and names for those we meet and cannot.
ELFCLASS64 = 2
ELFDATA2MSB = 2
EM_SUPPORTED = 62
EM_NAMES = {3: "i386", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "S390", 40: "ARM"} | {
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}

_SANE_ANCESTRY = 1 << 10
"""Longest chain of parents followed; PIDs are reused, so a loop must end."""

_UNEXPLAINED = "the kernel does not let us trace {}, and no rule visible in /proc says why"
_UNSEEN_RULES = (
    "what is left: a user namespace above ours, a security module (SELinux deny_ptrace, AppArmor),"
    " or a container's seccomp filter (start the container with --cap-add SYS_PTRACE)"
)


class CheckStatus(Enum):
    """How one check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Failure(Enum):
    """Which error a failed check means at attach."""

    GONE = "gone"
    UNSUPPORTED = "unsupported"
    PERMISSION = "permission"


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule and how it applies here.

    Attributes:
        name: Short and fixed, for tables and scripts.
        status: Whether it stands in the way.
        sentence: What was found, without a full stop.
        advice: What to do about it, or None.
        failure: What it means for an attach; set exactly when ``status`` is FAIL.
    """

    name: str
    status: CheckStatus
    sentence: str
    advice: str | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        """Keep status and failure in step."""
        if (self.status is CheckStatus.FAIL) != (self.failure is not None):
            raise ValueError(f"check {self.name}: status and failure disagree")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All checks of one process.

    Attributes:
        pid: The process asked about.
        checks: In the order in which the kernel would ask.
    """

    pid: int
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that stand in the way of an attach."""
        return tuple(check for check in self.checks if check.status is CheckStatus.FAIL)

    def error(self) -> AttachError | None:
        """Return the error an attach would raise, or None where it would work."""
        failed = self.failed
        if not failed:
            return None
        first = failed[0]
        hint = first.advice
        if len(failed) > 1:
            more = f"`optpoline doctor {self.pid}` lists {len(failed) - 1} more"
            hint = f"{hint}; {more}" if hint else more
        match first.failure:
            case Failure.GONE:
                return ProcessGone(self.pid, first.sentence)
            case Failure.UNSUPPORTED:
                return UnsupportedTarget(first.sentence, hint=hint)
            case _:
                return PermissionDenied(first.sentence, hint=hint)


@dataclass(frozen=True, slots=True)
class _Status:
    """The fields of one ``/proc/PID/status``."""

    fields: Mapping[str, str]

    def number(self, name: str, default: int = 0) -> int:
        """First decimal number of a field."""
        words = self.fields.get(name, "").split()
        return int(words[0]) if words else default

    def ids(self, name: str) -> tuple[int, int, int]:
        """Real, effective and saved id of the ``Uid`` or ``Gid`` field."""
        words = [int(word) for word in self.fields.get(name, "").split()] + [-1, -1, -1]
        return words[0], words[1], words[2]

    def capabilities(self, name: str) -> int:
        """A capability set as a bit mask."""
        return int(self.fields.get(name, "0") or "0", 16)

    def has_cap(self, cap: int) -> bool:
        """Whether a capability is in the effective set."""
        return bool(self.capabilities("CapEff") >> cap & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Scene:
    """Who asks about whom, as read once."""

    pid: int
    proc_root: Path
    sys_root: Path
    ours: _Status
    theirs: _Status

    @property
    def proc_dir(self) -> Path:
        """``/proc/PID`` of the target."""
        return self.proc_root / str(self.pid)

    @property
    def name(self) -> str:
        """The target as sentences call it."""
        comm = self.theirs.fields.get("Name", "")
        return f"process {self.pid} ({comm})" if comm else f"process {self.pid}"

    @property
    def may_override(self) -> bool:
        """Whether we hold CAP_SYS_PTRACE."""
        return self.ours.has_cap(CAP_SYS_PTRACE)

    @property
    def how_to_override(self) -> str:
        """Advice that gets CAP_SYS_PTRACE."""
        if self.ours.ids("Uid")[1] == 0:
            return (
                "we are root without CAP_SYS_PTRACE: start the container with --cap-add SYS_PTRACE"
            )
        return "run optpoline as root (sudo) or with CAP_SYS_PTRACE"


def diagnose(pid: int, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> Diagnosis:
    """Check every rule that decides whether we may attach to a process.

    Args:
        pid: The process.
        proc_root: Where procfs is mounted.
        sys_root: Where the sysctl tree is.

    Returns:
        The checks. Those that make no sense any more after a failed one (a
        process that does not exist has no owner) are left out.
    """
    try:
        theirs = _read_status(proc_root / str(pid))
    except PermissionError:
        sentence = f"/proc/{pid} cannot be read: /proc is mounted with hidepid"
        advice = "run optpoline as root, or mount /proc without hidepid"
        return Diagnosis(pid=pid, checks=(_fail("exists", sentence, advice, Failure.PERMISSION),))
    if theirs is None:
        sentence = f"there is no process {pid}"
        return Diagnosis(pid=pid, checks=(_fail("exists", sentence, None, Failure.GONE),))
    ours = _read_status(proc_root / "self") or _Status({})
    scene = _Scene(pid=pid, proc_root=proc_root, sys_root=sys_root, ours=ours, theirs=theirs)
    checks = [_check_kind(scene)]
    if checks[0].status is not CheckStatus.FAIL:
        checks += [
            _check_architecture(scene),
            _check_owner(scene),
            _check_capabilities(scene),
            _check_dumpable(scene),
            *_check_namespace(scene),
            _check_yama(scene),
            _check_tracer(scene),
            _check_seccomp(scene),
            _check_address_space(scene),
        ]
    if not any(check.failure for check in checks):
        checks += _check_access(scene)
    # What cannot be helped outranks what a privilege would solve; the sort is stable.
    checks.sort(key=lambda check: check.failure is Failure.PERMISSION)
    return Diagnosis(pid=pid, checks=tuple(checks))


def check_attachable(pid: int, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> None:
    """Raise the error an attach would end in, before anything is touched.

    Raises:
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: if it is a kernel thread, of another architecture, or ourselves.
        PermissionDenied: if a rule forbids us to trace it.
    """
    error = diagnose(pid, proc_root, sys_root).error()
    if error is not None:
        raise error


def explain_denied(pid: int, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> AttachError:
    """Return the error for an EPERM the kernel has just given us.

    Where no rule visible in ``/proc`` explains it, the error names what is left.
    """
    error = diagnose(pid, proc_root, sys_root).error()
    if error is not None:
        return error
    return PermissionDenied(_UNEXPLAINED.format(f"process {pid}"), hint=_UNSEEN_RULES)


# --- the rules, one function each -------------------------------------------


def _check_kind(scene: _Scene) -> Check:
    """It is a running user process, the leader of its threads, and not ourselves."""
    theirs, name = scene.theirs, scene.name
    state = theirs.fields.get("State", "")[:1]
    leader = theirs.number("Tgid", scene.pid)
    if state in {"Z", "X", "x"}:
        parent = theirs.number("PPid")
        sentence = (
            f"{name} has exited: a zombie that its parent, process {parent}, has not collected"
        )
        return _fail("kind", sentence, None, Failure.GONE)
    # "Kthread" exists since Linux 6.8; before, a process without memory is a kernel thread.
    if theirs.fields.get("Kthread") == "1" or "VmSize" not in theirs.fields:
        sentence = f"{name} is a kernel thread: it has no program to promote"
        return _fail("kind", sentence, None, Failure.UNSUPPORTED)
    if leader != scene.pid:
        sentence = f"{scene.pid} is a thread of process {leader}, not a process"
        return _fail("kind", sentence, f"use PID {leader}", Failure.UNSUPPORTED)
    if scene.ours.number("Pid", -1) == scene.pid:
        sentence = f"{name} is optpoline itself, which cannot trace itself"
        return _fail("kind", sentence, None, Failure.UNSUPPORTED)
    if state == "T":
        sentence = f"{name} is stopped by a signal"
        return Check(
            name="kind",
            status=CheckStatus.WARN,
            sentence=sentence,
            advice=f"nothing can be learnt until it runs: kill -CONT {scene.pid}",
        )
    return _ok("kind", f"{name} is a running user process")


def _check_architecture(scene: _Scene) -> Check:
    """Its executable is of the architecture we write code for."""
    try:
        with (scene.proc_dir / "exe").open("rb") as exe:
            header = exe.read(20)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            sentence = "its executable cannot be read with our rights"
        else:
            sentence = f"its executable cannot be read ({error.strerror})"
        return Check(name="architecture", status=CheckStatus.WARN, sentence=sentence)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        sentence = f"the executable of {scene.name} is not an ELF file"
        return _fail("architecture", sentence, None, Failure.UNSUPPORTED)
    machine = int.from_bytes(header[18:20], "big" if header[5] == ELFDATA2MSB else "little")
    machine_name = EM_NAMES.get(machine, f"of ELF machine {machine}")
    if header[4] != ELFCLASS64:
        sentence = f"{scene.name} is a 32-bit program ({machine_name})"
        advice = "only 64-bit x86-64 programs are supported"
        return _fail("architecture", sentence, advice, Failure.UNSUPPORTED)
    if machine != EM_SUPPORTED:
        sentence = f"{scene.name} is a program for {machine_name}"
        advice = "only 64-bit x86-64 programs are supported"
        return _fail("architecture", sentence, advice, Failure.UNSUPPORTED)
    return _ok("architecture", f"its executable is 64-bit {machine_name}")


def _check_owner(scene: _Scene) -> Check:
    """Our real ids are all of its ids, or we may override (__ptrace_may_access)."""
    uid, gid = scene.ours.ids("Uid")[0], scene.ours.ids("Gid")[0]
    uids, gids = scene.theirs.ids("Uid"), scene.theirs.ids("Gid")
    if set(uids) == {uid} and set(gids) == {gid}:
        return _ok("owner", f"it is ours (uid {uid})")
    if set(uids) != {uid}:
        shown = ", ".join(str(one) for one in sorted(set(uids)))
        found = f"{scene.name} belongs to uid {shown}, we are uid {uid}"
    else:
        shown = ", ".join(str(one) for one in sorted(set(gids)))
        found = f"{scene.name} runs with gid {shown}, we are gid {gid}"
    if scene.may_override:
        return _ok("owner", f"{found}, which CAP_SYS_PTRACE overrides")
    sentence = f"{found} and have no CAP_SYS_PTRACE"
    return _fail("owner", sentence, scene.how_to_override, Failure.PERMISSION)


def _check_capabilities(scene: _Scene) -> Check:
    """It holds no capability that we lack (cap_ptrace_access_check)."""
    extra = scene.theirs.capabilities("CapPrm") & ~scene.ours.capabilities("CapPrm")
    if not extra or scene.may_override:
        return _ok("capabilities", "it holds no capability that would keep us out")
    sentence = f"{scene.name} holds capabilities that we lack (mask {extra:#x})"
    return _fail("capabilities", sentence, scene.how_to_override, Failure.PERMISSION)


def _check_dumpable(scene: _Scene) -> Check:
    """It is dumpable; procfs gives files of one that is not to another owner."""
    try:
        owner = scene.proc_dir.stat().st_uid
    except OSError:
        return Check(name="dumpable", status=CheckStatus.WARN, sentence="its owner is unknown")
    if owner == scene.theirs.ids("Uid")[1]:
        return _ok("dumpable", "it is dumpable")
    if scene.may_override:
        return _ok("dumpable", "it is not dumpable, which CAP_SYS_PTRACE overrides")
    sentence = f"{scene.name} is not dumpable: set-uid, not readable, or by prctl(PR_SET_DUMPABLE)"
    return _fail("dumpable", sentence, scene.how_to_override, Failure.PERMISSION)


def _check_access(scene: _Scene) -> Iterator[Check]:
    """The kernel lets us look into it: who may not read may not attach either."""
    try:
        (scene.proc_dir / "exe").readlink()
    except PermissionError:
        yield _fail("access", _UNEXPLAINED.format(scene.name), _UNSEEN_RULES, Failure.PERMISSION)
    except OSError:
        return


def _check_namespace(scene: _Scene) -> Iterator[Check]:
    """Say when capabilities are counted in another user namespace."""
    try:
        theirs = (scene.proc_dir / "ns" / "user").readlink()
        ours = (scene.proc_root / "self" / "ns" / "user").readlink()
    except OSError:
        return
    if theirs == ours:
        yield _ok("user namespace", "it is in our user namespace")
        return
    yield Check(
        name="user namespace",
        status=CheckStatus.WARN,
        sentence="it is in another user namespace: our capabilities count there only if it is"
        " below ours",
        advice="if the attach is refused, run optpoline in its namespace or on the host",
    )


def _check_yama(scene: _Scene) -> Check:
    """The Yama security module lets us (Documentation/admin-guide/LSM/Yama.rst)."""
    try:
        scope = int((scene.sys_root / "kernel/yama/ptrace_scope").read_text().strip())
    except (OSError, ValueError):
        return _ok("ptrace_scope", "the kernel has no Yama restriction (kernel.yama.ptrace_scope)")
    rule = f"kernel.yama.ptrace_scope is {scope}"
    if scope >= 3:
        sentence = f"{rule}: no process may be traced, and that cannot be undone without a reboot"
        advice = "remove the setting from /etc/sysctl.d or the boot parameters and reboot"
        return _fail("ptrace_scope", sentence, advice, Failure.PERMISSION)
    if scope == 0 or scene.may_override:
        return _ok("ptrace_scope", f"{rule}, which lets us")
    sysctl = "sudo sysctl kernel.yama.ptrace_scope=0"
    if scope == 2:
        sentence = f"{rule}: only processes with CAP_SYS_PTRACE may trace"
        advice = f"{scene.how_to_override}, or run: {sysctl}"
        return _fail("ptrace_scope", sentence, advice, Failure.PERMISSION)
    if _is_descendant(scene):
        return _ok("ptrace_scope", f"{rule}, which lets us trace our own descendants")
    sentence = f"{rule}: only descendants may be traced, and {scene.name} is none of ours"
    advice = (
        f"run: {sysctl} (or {scene.how_to_override}, or start it with `optpoline run -- COMMAND`)"
    )
    return _fail("ptrace_scope", sentence, advice, Failure.PERMISSION)


def _check_tracer(scene: _Scene) -> Check:
    """Nobody else traces it."""
    tracer = scene.theirs.number("TracerPid")
    if tracer == 0:
        return _ok("tracer", "no other process traces it")
    try:
        comm = (scene.proc_root / str(tracer) / "comm").read_text().strip()
    except OSError:
        comm = "name unknown"
    sentence = f"{scene.name} is already traced by process {tracer} ({comm})"
    return _fail("tracer", sentence, "let that one detach first", Failure.PERMISSION)


def _check_seccomp(scene: _Scene) -> Check:
    """Its system calls are not filtered, or we may suspend the filter."""
    mode = scene.theirs.number("Seccomp")
    if mode == 0:
        return _ok("seccomp", "its system calls are not filtered")
    # PTRACE_O_SUSPEND_SECCOMP wants CAP_SYS_ADMIN and a tracer that is not filtered itself.
    can_suspend = scene.ours.has_cap(CAP_SYS_ADMIN) and scene.ours.number("Seccomp") == 0
    kind = "only four system calls are allowed" if mode == SECCOMP_STRICT else "a filter is set"
    if mode == SECCOMP_STRICT and not can_suspend:
        sentence = f"{scene.name} is under seccomp ({kind}): any call we need would kill it"
        advice = "run optpoline as root, outside of a container"
        return _fail("seccomp", sentence, advice, Failure.UNSUPPORTED)
    return Check(
        name="seccomp",
        status=CheckStatus.WARN,
        sentence=f"it is under seccomp ({kind}), which may refuse the arena's system calls",
        advice=None if can_suspend else "root outside of a container can suspend the filter",
    )


def _check_address_space(scene: _Scene) -> Check:
    """RLIMIT_AS leaves room for arenas."""
    try:
        lines = (scene.proc_dir / "limits").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("Max address space"):
            soft = line.split()[3]
            if soft != "unlimited":
                return Check(
                    name="address space",
                    status=CheckStatus.WARN,
                    sentence=f"its address space is limited to {soft} bytes (RLIMIT_AS)",
                    advice=f"if no arena fits: prlimit --pid {scene.pid} --as=unlimited",
                )
    return _ok("address space", "its address space is not limited")


# --- reading ----------------------------------------------------------------


def _read_status(proc_dir: Path) -> _Status | None:
    """Read one ``status`` file; None if there is no such process.

    Raises:
        PermissionError: if procfs hides it (hidepid).
    """
    try:
        text = (proc_dir / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None
    pairs = (line.partition(":") for line in text.splitlines())
    return _Status({name: value.strip() for name, _, value in pairs})


def _is_descendant(scene: _Scene) -> bool:
    """Whether following parents from the target leads to us."""
    ours = scene.ours.number("Pid", -1)
    pid = scene.theirs.number("PPid")
    for _ in range(_SANE_ANCESTRY):
        if pid == ours:
            return True
        try:
            status = _read_status(scene.proc_root / str(pid))
        except PermissionError:
            return False
        if pid <= 1 or status is None:
            return False
        pid = status.number("PPid")
    return False


def _ok(name: str, sentence: str) -> Check:
    """A rule that lets us."""
    return Check(name=name, status=CheckStatus.OK, sentence=sentence)


def _fail(name: str, sentence: str, advice: str | None, failure: Failure) -> Check:
    """A rule that does not."""
    return Check(
        name=name, status=CheckStatus.FAIL, sentence=sentence, advice=advice, failure=failure
    )
