# SPDX-License-Identifier: Apache-2.0
"""Say whether a process may be attached to, and if not, exactly which rule forbids it.

Each rule is one ``Check``: whether we may trace it (``rights``), and whether it is
of a kind that we can work on (``kinds``).

Invariants: everything is read, nothing is written, no process is touched.
Non-goals: what the machine offers in general, and whether there is a site.
"""

from __future__ import annotations

from pathlib import Path

from optpoline.errors import AttachError, PermissionDenied
from optpoline.process.checks import CheckStatus, Diagnosis, Failure, failed
from optpoline.process.kinds import (
    check_address_space,
    check_architecture,
    check_freezer,
    check_kind,
    check_seccomp,
    check_shadow_stack,
)
from optpoline.process.memory import RemoteMemory
from optpoline.process.rights import (
    UNEXPLAINED,
    UNSEEN_RULES,
    check_access,
    check_capabilities,
    check_dumpable,
    check_memory_file,
    check_namespace,
    check_owner,
    check_tracer,
    check_yama,
    name_tracer,
)
from optpoline.process.scene import read_scene
from optpoline.process.stop_lock import one_stop_at_a_time

__all__ = [
    "check_attachable",
    "check_has_program",
    "diagnose",
    "explain_denied",
    "explain_untraceable",
    "find_tracer",
    "open_program",
]

PROC_ROOT = Path("/proc")
SYS_ROOT = Path("/proc/sys")

_STOP_TIMEOUT_NS = 2_000_000_000
"""How long another controller's stop may take."""

_PROGRAM_CHECKS = frozenset({"exists", "kind", "architecture"})
"""Checks that say whether there is a program of our kind at all; to look at one takes no more."""


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
        scene = read_scene(pid, proc_root, sys_root)
    except PermissionError:
        sentence = f"/proc/{pid} cannot be read: /proc is mounted with hidepid"
        advice = "run optpoline as root, or mount /proc without hidepid"
        return Diagnosis(pid=pid, checks=(failed("exists", sentence, advice, Failure.PERMISSION),))
    if scene is None:
        sentence = f"there is no process {pid}"
        return Diagnosis(pid=pid, checks=(failed("exists", sentence, None, Failure.GONE),))
    checks = [check_kind(scene)]
    if checks[0].status is not CheckStatus.FAIL:
        checks += [
            check_architecture(scene),
            check_owner(scene),
            check_capabilities(scene),
            check_dumpable(scene),
            *check_namespace(scene),
            check_yama(scene),
            check_tracer(scene),
            check_seccomp(scene),
            check_shadow_stack(scene),
            check_freezer(scene),
            check_address_space(scene),
        ]
    if not any(check.failure for check in checks):
        checks += [*check_access(scene), *check_memory_file(scene)]
    # What cannot be helped outranks what a privilege would solve; the sort is stable.
    checks.sort(key=lambda check: check.failure is Failure.PERMISSION)
    return Diagnosis(pid=pid, checks=tuple(checks))


def check_attachable(pid: int, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> None:
    """Raise the error an attach would end in, before anything is touched.

    Another controller that has stopped the process for a moment is no tracer to complain of.

    Raises:
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: if it is a kernel thread, of another architecture, ourselves,
            under seccomp that we may not suspend, on shadow stacks, or frozen.
        PermissionDenied: if a rule forbids us to trace it.
    """
    with one_stop_at_a_time(pid, timeout_ns=_STOP_TIMEOUT_NS):
        error = diagnose(pid, proc_root, sys_root).error()
    if error is not None:
        raise error


def check_has_program(pid: int, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> None:
    """Raise the error of looking at what has no program of our kind.

    Unlike ``check_attachable``: where an attach is refused for other reasons (traced by
    another, seccomp, frozen), a process may be looked at all the same.

    Raises:
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: if it is a kernel thread, a thread, ourselves, or of another
            architecture.
        PermissionDenied: if ``/proc`` hides it.
    """
    for check in diagnose(pid, proc_root, sys_root).failed:
        if check.name in _PROGRAM_CHECKS:
            error = Diagnosis(pid=pid, checks=(check,)).error()
            assert error is not None
            raise error


def open_program(pid: int) -> RemoteMemory:
    """Open the memory of a process that has a program of our kind, to look at it.

    Raises:
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: see ``check_has_program``.
        PermissionDenied: if its memory may not be read; it says why.
    """
    check_has_program(pid)
    try:
        return RemoteMemory(pid)
    except PermissionDenied as denied:
        raise explain_denied(pid) from denied


def find_tracer(pid: int, proc_root: Path = PROC_ROOT) -> str | None:
    """Return ``process 321 (gdb)`` if that traces a process now; None if nobody does."""
    try:
        scene = read_scene(pid, proc_root, SYS_ROOT)
    except PermissionError:
        return None
    return None if scene is None else name_tracer(scene)


def explain_denied(pid: int, proc_root: Path = PROC_ROOT, sys_root: Path = SYS_ROOT) -> AttachError:
    """Return the error for an EPERM the kernel has just given us.

    Where no rule visible in ``/proc`` explains it, the error names what is left.
    """
    error = diagnose(pid, proc_root, sys_root).error()
    if error is not None:
        return error
    return PermissionDenied(UNEXPLAINED.format(f"process {pid}"), hint=UNSEEN_RULES)


def explain_untraceable(
    pid: int,
    denied: PermissionDenied,
    proc_root: Path = PROC_ROOT,
    sys_root: Path = SYS_ROOT,
) -> AttachError:
    """Return the error for a process that could be traced before and cannot be now.

    Rights count first, a debugger that has come among them: what kind of process it is was
    no obstacle before.

    Args:
        pid: The process.
        denied: What is left to say where no rule in ``/proc`` explains it.
        proc_root: Where procfs is mounted.
        sys_root: Where the sysctl tree is.
    """
    failed = diagnose(pid, proc_root, sys_root).failed
    by_rights = sorted(failed, key=lambda check: check.failure is not Failure.PERMISSION)
    return Diagnosis(pid=pid, checks=tuple(by_rights)).error() or denied
