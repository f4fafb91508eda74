# SPDX-License-Identifier: Apache-2.0
"""Typed readers of ``/proc/PID``: what a process is, its memory map, its threads.

Every function takes ``proc_root`` so that tests can hand it a tree of files.
A file that is gone means the process is gone: ``ProcessGone``.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from optpoline.errors import ProcessGone
from optpoline.model import Addr, Mapping
from optpoline.process.proc_files import (
    read_stat_fields,
    read_status_fields,
    read_text,
    unescape,
    wrap_error,
)

__all__ = [
    "RUNS_NO_CODE",
    "ProcessStatus",
    "decode_state_char",
    "list_every_tid",
    "list_tids",
    "read_exe_path",
    "read_layout",
    "read_maps",
    "read_maps_around",
    "read_processor",
    "read_seccomp_mode",
    "read_start_time",
    "read_state_char",
    "read_status",
]

_PROC = Path("/proc")
_MAX_LISTINGS = 16
"""Listings of threads before one is given up that nothing comes or goes in."""

_KERNEL_WORKER = "k"
RUNS_NO_CODE = "ZXx" + _KERNEL_WORKER
"""States (``read_state_char``) of what is listed as a thread of a program and runs none of its
code: it is dead, or it works for the kernel."""

# include/linux/sched.h; field 9 of stat. The first since Linux 5.10 ("sched: Bring the PF_IO_WORKER
# and PF_WQ_WORKER bits closer together"), the second since 6.4 ("fork/vm: Move common PF_IO_WORKER
# behavior to new flag"). Before, they said that a thread runs a virtual machine (PF_VCPU), and that
# it has loaded a module (PF_USED_ASYNC).
_PF_IO_WORKER, _PF_USER_WORKER = 0x10, 0x4000
_WORKER_BLOCKED = 0x7FFF_FFFF & ~(1 << 8 | 1 << 18)
"""The signals that a worker blocks from its first moment on, of the 31 that field 32 of stat tells:
all but SIGKILL and SIGSTOP (copy_process in kernel/fork.c)."""


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
    text = read_text(f"{proc_root}/{pid}/maps", pid) or _read_maps_of_threads(pid, proc_root)
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
        path=unescape(fields[5]) if len(fields) > 5 else "",
    )


def _read_maps_of_threads(pid: int, proc_root: Path) -> str:
    """Return the map of a process whose first thread has exited while others run."""
    for tid in list_every_tid(pid, proc_root=proc_root):
        try:
            if read_state_char(pid, tid, proc_root=proc_root) in RUNS_NO_CODE:
                continue
            text = read_text(f"{proc_root}/{pid}/task/{tid}/maps", pid)
        except ProcessGone:
            continue
        if text:
            return text
    return ""


def list_tids(pid: int, *, proc_root: Path = _PROC) -> tuple[int, ...]:
    """Return the ids of all threads, ascending; kernel workers are among them.

    Raises:
        ProcessGone: if the process does not exist.
    """
    try:
        names = os.listdir(f"{proc_root}/{pid}/task")
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError as error:
        raise wrap_error(error, pid, "task") from error
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
        n_threads = int(read_status_fields(f"{proc_root}/{pid}/status", pid)["Threads"])
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
    return int(read_stat_fields(f"{proc_root}/{pid}/stat", pid)[19])


def read_layout(pid: int, *, proc_root: Path = _PROC) -> tuple[int, ...]:
    """Return start and end of the code, and of the stack, that exec has laid out.

    Forks and those that share the memory have the same; zeros without memory, no
    addresses if we may not look.

    Raises:
        ProcessGone: if the process does not exist.
    """
    return tuple(map(int, read_stat_fields(f"{proc_root}/{pid}/stat", pid)[23:26]))


def read_state_char(pid: int, tid: int, *, proc_root: Path = _PROC) -> str:
    """Return a thread's state letter; cheaper than ``thread_state.read_thread_state``.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    return decode_state_char(read_stat_fields(f"{proc_root}/{pid}/task/{tid}/stat", tid))


def decode_state_char(fields: Sequence[str]) -> str:
    """Return the state letter of a thread, "k" for a kernel worker whatever it does.

    io_uring (since Linux 5.12) and vhost (since 6.4) have their work done by threads of the
    program, to look at: they are listed, and have its memory and the registers of the thread
    that made them, but for ip and sp, which are 0. They never leave the kernel. There is nothing
    to be learnt from one, none can run a system call for us, and the program has ended when no
    other threads are left.

    Args:
        fields: Of its stat, those behind the name.
    """
    is_flagged = int(fields[6]) & (_PF_IO_WORKER | _PF_USER_WORKER)
    if is_flagged and int(fields[29]) == _WORKER_BLOCKED:
        return _KERNEL_WORKER
    return fields[0]


def read_processor(pid: int, tid: int, *, proc_root: Path = _PROC) -> int:
    """Return the CPU that a thread is on, or was on last.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    return int(read_stat_fields(f"{proc_root}/{pid}/task/{tid}/stat", tid)[36])


def read_status(pid: int, *, tid: int | None = None, proc_root: Path = _PROC) -> ProcessStatus:
    """Return what ``status`` says about a process, or about one of its threads.

    Raises:
        ProcessGone: if it does not exist.
    """
    directory = f"{proc_root}/{pid}" if tid is None else f"{proc_root}/{pid}/task/{tid}"
    fields = read_status_fields(f"{directory}/status", pid if tid is None else tid)
    own_id = int(fields["Pid"])
    return ProcessStatus(
        pid=own_id,
        name=unescape(fields["Name"]),
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


def read_seccomp_mode(pid: int, tid: int, *, proc_root: Path = _PROC) -> int:
    """Return a thread's seccomp mode, 0 for none; in a stop, where ``read_status`` is long.

    Raises:
        ProcessGone: if the thread does not exist.
    """
    text = read_text(f"{proc_root}/{pid}/task/{tid}/status", tid)
    return int(text.partition("\nSeccomp:")[2].partition("\n")[0] or "0")


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
        raise wrap_error(error, pid, "exe") from error


def _is_kernel_thread(fields: dict[str, str], directory: str, pid: int) -> bool:
    """Say whether a task is the kernel's own; older kernels do not tell in status."""
    if "Kthread" in fields:
        return fields["Kthread"] == "1"
    pf_kthread = 0x00200000
    return bool(int(read_stat_fields(f"{directory}/stat", pid)[6]) & pf_kthread)
