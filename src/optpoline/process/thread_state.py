# SPDX-License-Identifier: Apache-2.0
"""Where a thread is: running, in which system call, or asleep elsewhere, and whether it stayed.

Every function takes ``proc_root`` so that tests can hand it a tree of files.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from optpoline.errors import OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.process.proc_files import read_status_fields, read_text

__all__ = [
    "ThreadState",
    "ThreadWhere",
    "has_slept_since",
    "read_asleep",
    "read_kernel_stack",
    "read_thread_state",
]

_PROC = Path("/proc")


class ThreadWhere(Enum):
    """Where a thread is, as ``/proc/PID/task/TID/syscall`` tells it."""

    RUNNING = "running"
    IN_SYSCALL = "in_syscall"
    BLOCKED = "blocked"
    """Asleep, but not in a system call: a page fault, or stopped in user code."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadState:
    """Where one thread is, and two counters that help to tell whether it moved.

    Attributes:
        tid: Thread id.
        state: State letter as in ps(1).
        where: Running, in a system call, or blocked elsewhere.
        syscall_nr: Number of the system call, or -1.
        syscall_args: Its six arguments, () outside a call.
        sp: User stack pointer, 0 while running.
        pc: User program counter, 0 while running.
        n_voluntary: Voluntary context switches so far.
        n_nonvoluntary: Involuntary context switches so far.
        tracer_pid: Thread id of its tracer, or 0.
        seccomp: Its seccomp mode, 0 for none.
    """

    tid: int
    state: str
    where: ThreadWhere
    syscall_nr: int
    syscall_args: tuple[int, ...]
    sp: Addr
    pc: Addr
    n_voluntary: int
    n_nonvoluntary: int
    tracer_pid: int
    seccomp: int = 0


def read_thread_state(pid: int, tid: int, *, proc_root: Path = _PROC) -> ThreadState:
    """Return where a thread is.

    The counters and the tracer are read first, for ``has_slept_since``.

    Raises:
        ProcessGone: if the thread does not exist.
        PermissionDenied: if we may not trace it.
    """
    directory = f"{proc_root}/{pid}/task/{tid}"
    status = read_status_fields(f"{directory}/status", tid)
    words = read_text(f"{directory}/syscall", tid).split()
    where, nr, numbers = ThreadWhere.RUNNING, -1, (0, 0)
    args: tuple[int, ...] = ()
    if words and words[0] != "running":
        nr = int(words[0])
        where = ThreadWhere.IN_SYSCALL if nr >= 0 else ThreadWhere.BLOCKED
        args = tuple(int(word, 16) for word in words[1:-2])
        numbers = (int(words[-2], 16), int(words[-1], 16))
    n_voluntary, n_nonvoluntary = _switches(status)
    return ThreadState(
        tid=tid,
        state=status["State"][:1],
        where=where,
        syscall_nr=nr,
        syscall_args=args,
        sp=Addr(numbers[0]),
        pc=Addr(numbers[1]),
        n_voluntary=n_voluntary,
        n_nonvoluntary=n_nonvoluntary,
        tracer_pid=int(status["TracerPid"]),
        seccomp=int(status.get("Seccomp", "0")),
    )


def read_asleep(pid: int, tid: int, *, proc_root: Path = _PROC) -> ThreadState | None:
    """Return where a thread sleeps; None if it may be on a CPU, or is gone.

    Raises:
        PermissionDenied: if we may not trace it.
    """
    try:
        state = read_thread_state(pid, tid, proc_root=proc_root)
    except ProcessGone:
        return None
    return None if state.where is ThreadWhere.RUNNING else state


def has_slept_since(pid: int, before: ThreadState, *, proc_root: Path = _PROC) -> bool:
    """Tell whether a thread is there and has slept all the while since ``read_asleep``.

    The kernel counts a voluntary switch when a thread *leaves* its CPU: one that woke and
    still runs has the counters of its sleep. So it must

    1. be asleep again or still (the kernel shows sp and pc of no other), where it was; and
    2. after that have the counters that it had before the first look. Had it run in between,
       it would have left its CPU once more to be asleep in 1.

    In the other order it could run between the two, and sleep again in the same call.

    Args:
        pid: Its process.
        before: What was read of it when it slept.
        proc_root: Where procfs is mounted.

    Raises:
        PermissionDenied: if we may not trace it.
    """
    try:
        return _has_slept_since(f"{proc_root}/{pid}/task/{before.tid}", before)
    except ProcessGone:
        return False


def _has_slept_since(directory: str, before: ThreadState) -> bool:
    """Tell so of a thread, by its directory.

    Raises:
        ProcessGone: if it does not exist.
        PermissionDenied: if we may not trace it.
    """
    words = read_text(f"{directory}/syscall", before.tid).split()
    if not words or words[0] == "running":
        return False
    where = (int(words[0]), int(words[-2], 16), int(words[-1], 16))
    if where != (before.syscall_nr, before.sp, before.pc):
        return False
    status = read_status_fields(f"{directory}/status", before.tid)
    return _switches(status) == (before.n_voluntary, before.n_nonvoluntary)


def _switches(status: dict[str, str]) -> tuple[int, int]:
    """Return the counters of voluntary and involuntary context switches."""
    return int(status["voluntary_ctxt_switches"]), int(status["nonvoluntary_ctxt_switches"])


def read_kernel_stack(pid: int, tid: int, *, proc_root: Path = _PROC) -> str:
    """Return the functions of the kernel that a thread is in, off its CPU, innermost first.

    Empty while it is on a CPU, and where we may not look: it takes CAP_SYS_ADMIN, and a
    kernel with stack traces.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    try:
        return read_text(f"{proc_root}/{pid}/task/{tid}/stack", tid)
    except ProcessGone:
        raise
    except OptpolineError:
        return ""
