# SPDX-License-Identifier: Apache-2.0
"""The rules that decide whether we may trace a process, in the kernel's own order.

The kernel answers every refused ``ptrace`` with the same EPERM. What is behind it
(``__ptrace_may_access`` and the security modules) is visible in ``/proc``.
"""

from __future__ import annotations

from collections.abc import Iterator

from optpoline.process.checks import Check, Failure, failed, passed, warned
from optpoline.process.scene import CAP_DAC_OVERRIDE, Scene, read_status_fields

__all__ = [
    "UNEXPLAINED",
    "UNSEEN_RULES",
    "check_access",
    "check_capabilities",
    "check_dumpable",
    "check_memory_file",
    "check_namespace",
    "check_owner",
    "check_tracer",
    "check_yama",
    "name_tracer",
]

_SANE_ANCESTRY = 1 << 10
"""Longest chain of parents followed; PIDs are reused, so a loop must end."""

UNEXPLAINED = "the kernel does not let us trace {}, and no rule visible in /proc says why"
UNSEEN_RULES = (
    "what is left: a user namespace above ours, a security module (SELinux deny_ptrace, AppArmor),"
    " or a container's seccomp filter (start the container with --cap-add SYS_PTRACE)"
)


def check_owner(scene: Scene) -> Check:
    """Our real ids are all of its ids, or we may override (__ptrace_may_access)."""
    uid, gid = scene.ours.ids("Uid")[0], scene.ours.ids("Gid")[0]
    uids, gids = scene.theirs.ids("Uid"), scene.theirs.ids("Gid")
    if set(uids) == {uid} and set(gids) == {gid}:
        return passed("owner", f"it is ours (uid {uid})")
    if set(uids) != {uid}:
        shown = ", ".join(str(one) for one in sorted(set(uids)))
        found = f"{scene.name} belongs to uid {shown}, we are uid {uid}"
    else:
        shown = ", ".join(str(one) for one in sorted(set(gids)))
        found = f"{scene.name} runs with gid {shown}, we are gid {gid}"
    if scene.may_override:
        return passed("owner", f"{found}, which CAP_SYS_PTRACE overrides")
    sentence = f"{found} and have no CAP_SYS_PTRACE"
    return failed("owner", sentence, scene.how_to_override, Failure.PERMISSION)


def check_capabilities(scene: Scene) -> Check:
    """It holds no capability that we lack (cap_ptrace_access_check)."""
    extra = scene.theirs.capabilities("CapPrm") & ~scene.ours.capabilities("CapPrm")
    if not extra or scene.may_override:
        return passed("capabilities", "it holds no capability that would keep us out")
    sentence = f"{scene.name} holds capabilities that we lack (mask {extra:#x})"
    return failed("capabilities", sentence, scene.how_to_override, Failure.PERMISSION)


def check_dumpable(scene: Scene) -> Check:
    """It is dumpable; procfs gives files of one that is not to another owner."""
    try:
        owner = scene.proc_dir.stat().st_uid
    except OSError:
        return warned("dumpable", "its owner is unknown")
    if owner == scene.theirs.ids("Uid")[1]:
        return passed("dumpable", "it is dumpable")
    if scene.may_override:
        return passed("dumpable", "it is not dumpable, which CAP_SYS_PTRACE overrides")
    sentence = f"{scene.name} is not dumpable: set-uid, not readable, or by prctl(PR_SET_DUMPABLE)"
    return failed("dumpable", sentence, scene.how_to_override, Failure.PERMISSION)


def check_access(scene: Scene) -> Iterator[Check]:
    """The kernel lets us look into it: who may not read may not attach either."""
    try:
        (scene.proc_dir / "exe").readlink()
    except PermissionError:
        yield failed("access", UNEXPLAINED.format(scene.name), UNSEEN_RULES, Failure.PERMISSION)
    except OSError:
        return


def check_memory_file(scene: Scene) -> Iterator[Check]:
    """We may open its memory: a file of mode 0600, for which CAP_SYS_PTRACE counts nothing."""
    try:
        owner = (scene.proc_dir / "mem").stat().st_uid
    except OSError:
        return
    if owner != scene.ours.ids("Uid")[1] and not scene.ours.has_cap(CAP_DAC_OVERRIDE):
        sentence = f"/proc/{scene.pid}/mem belongs to uid {owner}, and we have no CAP_DAC_OVERRIDE"
        advice = "run optpoline as root (sudo), or with CAP_DAC_OVERRIDE besides CAP_SYS_PTRACE"
        yield failed("memory file", sentence, advice, Failure.PERMISSION)


def check_namespace(scene: Scene) -> Iterator[Check]:
    """Say when capabilities are counted in another user namespace."""
    try:
        theirs = (scene.proc_dir / "ns" / "user").readlink()
        ours = (scene.proc_root / "self" / "ns" / "user").readlink()
    except OSError:
        return
    if theirs == ours:
        yield passed("user namespace", "it is in our user namespace")
        return
    yield warned(
        "user namespace",
        "it is in another user namespace: our capabilities count there only if it is below ours",
        "if the attach is refused, run optpoline in its namespace or on the host",
    )


def check_yama(scene: Scene) -> Check:
    """The Yama security module lets us (Documentation/admin-guide/LSM/Yama.rst)."""
    try:
        scope = int((scene.sys_root / "kernel/yama/ptrace_scope").read_text().strip())
    except (OSError, ValueError):
        return passed(
            "ptrace_scope", "the kernel has no Yama restriction (kernel.yama.ptrace_scope)"
        )
    rule = f"kernel.yama.ptrace_scope is {scope}"
    if scope >= 3:
        sentence = f"{rule}: no process may be traced, and that cannot be undone without a reboot"
        advice = "remove the setting from /etc/sysctl.d or the boot parameters and reboot"
        return failed("ptrace_scope", sentence, advice, Failure.PERMISSION)
    if scope == 0 or scene.may_override:
        return passed("ptrace_scope", f"{rule}, which lets us")
    sysctl = "sudo sysctl kernel.yama.ptrace_scope=0"
    if scope == 2:
        sentence = f"{rule}: only processes with CAP_SYS_PTRACE may trace"
        advice = f"{scene.how_to_override}, or run: {sysctl}"
        return failed("ptrace_scope", sentence, advice, Failure.PERMISSION)
    if _is_descendant(scene):
        return passed("ptrace_scope", f"{rule}, which lets us trace our own descendants")
    sentence = f"{rule}: only descendants may be traced, and {scene.name} is none of ours"
    advice = (
        f"run: {sysctl} (or {scene.how_to_override}, or start it with `optpoline run -- COMMAND`)"
    )
    return failed("ptrace_scope", sentence, advice, Failure.PERMISSION)


def check_tracer(scene: Scene) -> Check:
    """Nobody else traces it, nor any of its threads."""
    tracer = name_tracer(scene)
    if tracer is None:
        return passed("tracer", "no other process traces it")
    sentence = f"{scene.name} is already traced by {tracer}"
    return failed("tracer", sentence, "let that one detach first", Failure.PERMISSION)


def name_tracer(scene: Scene) -> str | None:
    """Return ``process 321 (gdb)`` if that traces it, or one of its threads."""
    tracers = (thread.number("TracerPid") for thread in scene.threads)
    tracer = next((pid for pid in tracers if pid), 0)
    if tracer == 0:
        return None
    try:
        comm = (scene.proc_root / str(tracer) / "comm").read_text().strip()
    except OSError:
        comm = "name unknown"
    return f"process {tracer} ({comm})"


def _is_descendant(scene: Scene) -> bool:
    """Whether following parents from the target leads to us."""
    ours = scene.ours.number("Pid", -1)
    pid = scene.theirs.number("PPid")
    for _ in range(_SANE_ANCESTRY):
        if pid == ours:
            return True
        try:
            status = read_status_fields(scene.proc_root / str(pid))
        except PermissionError:
            return False
        if pid <= 1 or status is None:
            return False
        pid = status.number("PPid")
    return False
