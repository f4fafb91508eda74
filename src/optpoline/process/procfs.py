# SPDX-License-Identifier: Apache-2.0
"""Typed readers of ``/proc/PID``.

Every function takes ``proc_root`` so that tests can hand it a tree of files.
A file that is gone means the process is gone: ``ProcessGone``.
"""

from __future__ import annotations

import errno
import os
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone
from optpoline.model import Addr, Mapping

__all__ = [
    "ProcessStatus",
    "ThreadState",
    "ThreadWhere",
    "has_slept_since",
    "is_kernel_worker",
    "list_every_tid",
    "list_tids",
    "read_exe_path",
    "read_kernel_stack",
    "read_layout",
    "read_maps",
    "read_maps_around",
    "read_processor",
    "read_start_time",
    "read_state_char",
    "read_status",
    "read_thread_state",
]

_PROC = Path("/proc")
_CHUNK_SIZE = 1 << 18
_MAX_LISTINGS = 16
"""Listings of threads before one is given up that nothing comes or goes in."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProcessStatus:
    """What ``/proc/PID/status`` says about a process or thread.

    Attributes:
        pid: Process or thread id.
        name: Name of the command, at most 15 bytes.
        state: State letter as in ps(1): R, S, D, T, t, Z, X.
        tgid: Process id of a thread's process.
        ppid: Parent process, 0 where it is outside our namespace.
        uids: Real, effective, saved and file system user id.
        gids: Likewise for the group.
        tracer_pid: Thread id of its tracer, or 0.
        ns_pids: Its ids in nested pid namespaces, ours first.
        n_threads: Number of threads.
        seccomp: 0 off, 1 strict, 2 filter.
        cap_eff: Effective capabilities, capability n in bit n.
        cap_prm: Those that it may make effective.
        is_kernel_thread: Whether it has no program to run.
    """

    pid: int
    name: str
    state: str
    tgid: int
    ppid: int
    uids: tuple[int, ...]
    gids: tuple[int, ...]
    tracer_pid: int
    ns_pids: tuple[int, ...]
    n_threads: int
    seccomp: int
    cap_eff: int
    cap_prm: int
    is_kernel_thread: bool


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


def read_maps(pid: int, *, proc_root: Path = _PROC) -> tuple[Mapping, ...]:
    """Return the memory map, in address order.

    Raises:
        ProcessGone: if the process does not exist, or has no memory any more.
        PermissionDenied: if we may not look.
    """
    return tuple(_decode_mapping(line) for line in _read_map_lines(pid, proc_root))


def read_maps_around(pid: int, addr: int, *, proc_root: Path = _PROC) -> tuple[Mapping, ...]:
    """Return the mapping that an address is in, or ends, or is below, and the one before it.

    Those that there are; in a stop, where a program of thousands of threads would stand for
    milliseconds until all of its stacks are decoded.

    Raises:
        ProcessGone: if the process does not exist, or has no memory any more.
        PermissionDenied: if we may not look.
    """
    before: str | None = None
    for line in _read_map_lines(pid, proc_root):
        end = line[line.index("-") + 1 : line.index(" ")]
        if int(end, 16) >= addr:
            return tuple(_decode_mapping(one) for one in (before, line) if one is not None)
        before = line
    return () if before is None else (_decode_mapping(before),)


def _read_map_lines(pid: int, proc_root: Path) -> list[str]:
    """Return the lines of a memory map, at least one."""
    text = _read_text(f"{proc_root}/{pid}/maps", pid) or _read_maps_of_threads(pid, proc_root)
    if not text:
        raise ProcessGone(pid, f"process {pid} has no memory: it has exited, or is the kernel's")
    return text.splitlines()


def _decode_mapping(line: str) -> Mapping:
    """Decode one line of a memory map."""
    fields = line.split(maxsplit=5)
    start, _, end = fields[0].partition("-")
    return Mapping(
        start=Addr(int(start, 16)),
        end=Addr(int(end, 16)),
        perms=fields[1],
        offset=int(fields[2], 16),
        device=fields[3],
        inode=int(fields[4]),
        path=_unescape(fields[5]) if len(fields) > 5 else "",
    )


def _read_maps_of_threads(pid: int, proc_root: Path) -> str:
    """Return the map of a process whose first thread has exited while others run."""
    for tid in list_every_tid(pid, proc_root=proc_root):
        try:
            text = _read_text(f"{proc_root}/{pid}/task/{tid}/maps", pid)
        except ProcessGone:
            continue
        if text:
            return text
    return ""


def list_tids(pid: int, *, proc_root: Path = _PROC) -> tuple[int, ...]:
    """Return the ids of all threads, ascending.

    Raises:
        ProcessGone: if the process does not exist.
    """
    try:
        names = os.listdir(f"{proc_root}/{pid}/task")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError as error:
        raise _wrap(error, pid, "task") from error
    if not names:
        raise ProcessGone(pid)
    return tuple(sorted(map(int, names)))


def list_every_tid(pid: int, *, proc_root: Path = _PROC) -> tuple[int, ...]:
    """Return the ids of all threads there were at some moment of this call, at least.

    The kernel goes from one thread to the next while they come and go: when the one that it
    is at exits, a listing ends early, or goes on at a number that has another thread by then.
    One is complete if it has as many threads as the process had behind it, and all of them
    are there after that. Where none is, because they come and go all the time, it is what
    all of several listings showed, those that may be gone included.

    Raises:
        ProcessGone: if the process does not exist.
    """
    tids = list_tids(pid, proc_root=proc_root)
    every = set(tids)
    for _ in range(_MAX_LISTINGS):
        n_threads = int(_read_status_fields(f"{proc_root}/{pid}/status", pid)["Threads"])
        again = list_tids(pid, proc_root=proc_root)
        if len(tids) == n_threads and set(tids) <= set(again):
            return again
        tids = again
        every.update(tids)
    return tuple(sorted(every))


def read_start_time(pid: int, *, proc_root: Path = _PROC) -> int:
    """Return when it was started, in clock ticks since boot; with the pid, its identity.

    Raises:
        ProcessGone: if the process does not exist.
    """
    # Field 22; the fields behind the last ")" begin with field 3.
    return int(_read_stat_fields(f"{proc_root}/{pid}/stat", pid)[19])


def read_layout(pid: int, *, proc_root: Path = _PROC) -> tuple[int, ...]:
    """Return start and end of the code, and of the stack, that exec has laid out.

    Forks and those that share the memory have the same; zeros without memory, no
    addresses if we may not look.

    Raises:
        ProcessGone: if the process does not exist.
    """
    return tuple(map(int, _read_stat_fields(f"{proc_root}/{pid}/stat", pid)[23:26]))


def read_state_char(pid: int, tid: int, *, proc_root: Path = _PROC) -> str:
    """Return a thread's state letter; cheaper than ``read_thread_state``.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    return _read_stat_fields(f"{proc_root}/{pid}/task/{tid}/stat", tid)[0]


def read_processor(pid: int, tid: int, *, proc_root: Path = _PROC) -> int:
    """Return the CPU that a thread is on, or was on last.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    return int(_read_stat_fields(f"{proc_root}/{pid}/task/{tid}/stat", tid)[36])


def is_kernel_worker(pid: int, tid: int, *, proc_root: Path = _PROC) -> bool:
    """Tell whether a thread works for the kernel alone: io_uring and vhost have such.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    pf_io_worker, pf_user_worker = 0x10, 0x4000  # include/linux/sched.h
    flags = int(_read_stat_fields(f"{proc_root}/{pid}/task/{tid}/stat", tid)[6])
    return bool(flags & (pf_io_worker | pf_user_worker))


def read_status(pid: int, *, tid: int | None = None, proc_root: Path = _PROC) -> ProcessStatus:
    """Return what ``status`` says about a process, or about one of its threads.

    Raises:
        ProcessGone: if it does not exist.
    """
    directory = f"{proc_root}/{pid}" if tid is None else f"{proc_root}/{pid}/task/{tid}"
    fields = _read_status_fields(f"{directory}/status", pid if tid is None else tid)
    own_id = int(fields["Pid"])
    return ProcessStatus(
        pid=own_id,
        name=_unescape(fields["Name"]),
        state=fields["State"][:1],
        tgid=int(fields["Tgid"]),
        ppid=int(fields["PPid"]),
        uids=tuple(map(int, fields["Uid"].split())),
        gids=tuple(map(int, fields["Gid"].split())),
        tracer_pid=int(fields["TracerPid"]),
        ns_pids=tuple(map(int, fields.get("NSpid", str(own_id)).split())),
        n_threads=int(fields["Threads"]),
        seccomp=int(fields.get("Seccomp", "0")),
        cap_eff=int(fields["CapEff"], 16),
        cap_prm=int(fields.get("CapPrm", fields["CapEff"]), 16),
        is_kernel_thread=_is_kernel_thread(fields, directory, pid),
    )


def read_thread_state(pid: int, tid: int, *, proc_root: Path = _PROC) -> ThreadState:
    """Return where a thread is.

    The counters and the tracer are read first, for ``has_slept_since``.

    Raises:
        ProcessGone: if the thread does not exist.
        PermissionDenied: if we may not trace it.
    """
    directory = f"{proc_root}/{pid}/task/{tid}"
    status = _read_status_fields(f"{directory}/status", tid)
    words = _read_text(f"{directory}/syscall", tid).split()
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
    )


def has_slept_since(pid: int, before: ThreadState, *, proc_root: Path = _PROC) -> bool:
    """Tell whether a thread has slept all the while since ``read_thread_state``.

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
        ProcessGone: if the thread does not exist.
        PermissionDenied: if we may not trace it.
    """
    directory = f"{proc_root}/{pid}/task/{before.tid}"
    words = _read_text(f"{directory}/syscall", before.tid).split()
    if not words or words[0] == "running":
        return False
    where = (int(words[0]), int(words[-2], 16), int(words[-1], 16))
    if where != (before.syscall_nr, before.sp, before.pc):
        return False
    status = _read_status_fields(f"{directory}/status", before.tid)
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
        return _read_text(f"{proc_root}/{pid}/task/{tid}/stack", tid)
    except ProcessGone:
        raise
    except OptpolineError:
        return ""


def read_exe_path(pid: int, *, proc_root: Path = _PROC) -> str:
    """Return the path of the executable as the kernel names it, without " (deleted)".

    Raises:
        ProcessGone: if the process does not exist or has no executable.
        PermissionDenied: if we may not look.
    """
    try:
        return os.readlink(f"{proc_root}/{pid}/exe").removesuffix(" (deleted)")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError as error:
        raise _wrap(error, pid, "exe") from error


def _is_kernel_thread(fields: dict[str, str], directory: str, pid: int) -> bool:
    """Say whether a task is the kernel's own; older kernels do not tell in status."""
    if "Kthread" in fields:
        return fields["Kthread"] == "1"
    pf_kthread = 0x00200000
    return bool(int(_read_stat_fields(f"{directory}/stat", pid)[6]) & pf_kthread)


def _read_status_fields(path: str, pid: int) -> dict[str, str]:
    """Return the lines of a status file by key."""
    fields = {}
    for line in _read_text(path, pid).splitlines():
        key, _, value = line.partition(":")
        fields[key] = value.strip()
    if "State" not in fields:
        raise ProcessGone(pid)
    return fields


def _read_stat_fields(path: str, pid: int) -> list[str]:
    """Return the fields of a stat file behind the name, which may contain anything."""
    text = _read_text(path, pid)
    fields = text[text.rfind(")") + 2 :].split()
    if not fields:
        raise ProcessGone(pid)
    return fields


def _read_text(path: str, pid: int) -> str:
    """Read a whole file of /proc, in one system call where it is small."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunks = []
            while chunk := os.read(fd, _CHUNK_SIZE):
                chunks.append(chunk)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError as error:
        raise _wrap(error, pid, path.rpartition("/")[2]) from error
    return b"".join(chunks).decode(errors="surrogateescape")


def _wrap(error: OSError, pid: int, name: str) -> OptpolineError:
    """Turn an error of a read into one that names the process."""
    if isinstance(error, PermissionError):
        return PermissionDenied(f"we may not read {name} of process {pid}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return PermissionDenied(f"we may not read {name} of process {pid}: {error.strerror}")
    return OptpolineError(f"{name} of process {pid} cannot be read: {error.strerror}")


def _unescape(text: str) -> str:
    """Undo the kernel's escape of newlines in names."""
    return text.replace("\\012", "\n") if "\\" in text else text
