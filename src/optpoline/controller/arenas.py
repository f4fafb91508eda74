# SPDX-License-Identifier: Apache-2.0
"""Make an arena in a stopped target, and take one away again."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

from optpoline.errors import AddressTaken, ArenaError
from optpoline.model import Addr
from optpoline.patch.arena import Arena
from optpoline.patch.geometry import ArenaGeometry
from optpoline.patch.layout import ARENA_NAME, ArenaHeader
from optpoline.process.memory import Memory
from optpoline.process.robust_list import are_made_alike
from optpoline.process.rseq import choose_rseq_abi
from optpoline.process.stop import Stop
from optpoline.x86.syscalls import SYS_CLOSE, SYS_MEMFD_CREATE, SYS_MMAP, SYS_MUNMAP

__all__ = ["map_arena", "unmap_range"]

_MAP_HINTS = {
    errno.ENOMEM: "raise its limit of address space",
    errno.EAGAIN: "it locks all its memory (mlockall): raise its limit of locked memory",
}

# include/uapi/linux/memfd.h
_MFD_CLOEXEC = 1
_MFD_ALLOW_SEALING = 2
_MFD_NOEXEC_SEAL = 8
# include/uapi/asm-generic/mman-common.h
_MAP_FIXED_NOREPLACE = 0x100000
# include/uapi/linux/fcntl.h
_F_ADD_SEALS = 1033
_F_SEAL_SHRINK = 2
_F_SEAL_GROW = 4
_F_SEAL_FUTURE_WRITE = 16


def map_arena(
    pid: int,
    stop: Stop,
    memory: Memory,
    addr: Addr,
    geometry: ArenaGeometry,
    *,
    controller_start: int,
) -> Arena:
    """Create an arena's memfd in the target and map it there and here.

    Nothing of it is resident until it is written, but where the target locks all its
    memory (MCL_FUTURE): there the kernel makes all pages of all parts at once.

    Args:
        pid: The target.
        stop: In which it stands.
        memory: Its memory.
        addr: Where.
        geometry: The arena's parts.
        controller_start: When we were started, for the header (``read_start_time``).

    Target state: running threads stopped.
    On error: nothing of it stays mapped or open in the target.

    Raises:
        AddressTaken: if something of the target's is there by now.
        ArenaError: if the target's limits forbid a file or a mapping.
    """
    target_fd = _create_memfd(pid, stop)
    try:
        fd = _open_memfd(pid, stop, target_fd)
        try:
            # One thread at least stands by now: that which ran the call.
            registrations = stop.read_rseq_registrations() if geometry.n_cpus else ()
            rseq = choose_rseq_abi(registrations, memory)
            if rseq is not None and not are_made_alike(registrations, stop.sleepers, memory):
                rseq = None
            header = ArenaHeader(
                size=geometry.size,
                block_off=geometry.block_off,
                code_off=geometry.code_off,
                literal_off=geometry.literal_off,
                counter_off=geometry.counter_off,
                controller_pid=os.getpid(),
                controller_start=controller_start,
                target_pid=pid,
                n_entries=0,
                row_shift=geometry.row_shift,
                n_cpus=geometry.n_cpus,
                rseq=rseq,
            )
            arena = _map_parts(stop, addr, geometry, header, target_fd, fd)
        finally:
            os.close(fd)
    finally:
        stop.inject(SYS_CLOSE, target_fd)
    return arena


def _create_memfd(pid: int, stop: Stop) -> int:
    """Create the memfd in the target; return its number there."""
    name = ARENA_NAME.encode() + b"\0"
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    # Linux 6.3 wants to be told that the file itself is never executed.
    result = stop.inject(SYS_MEMFD_CREATE, name, flags | _MFD_NOEXEC_SEAL)
    if result < 0:
        result = stop.inject(SYS_MEMFD_CREATE, name, flags)
    if result < 0:
        raise ArenaError(
            f"process {pid} cannot create an arena: memfd_create: {os.strerror(-result)}",
            hint="raise its limit of open files" if -result in (23, 24) else None,
        )
    return result


def _open_memfd(pid: int, stop: Stop, target_fd: int) -> int:
    """Open the target's memfd for ourselves."""
    try:
        return os.open(f"/proc/{stop.injector_tid}/fd/{target_fd}", os.O_RDWR | os.O_CLOEXEC)
    except OSError as error:
        raise ArenaError(
            f"the arena that process {pid} has made cannot be opened: {error.strerror}",
            hint="run optpoline as root, or raise its own limit of open files",
        ) from error


def _map_parts(
    stop: Stop,
    addr: Addr,
    geometry: ArenaGeometry,
    header: ArenaHeader,
    target_fd: int,
    fd: int,
) -> Arena:
    """Map the parts, counters first: the seal forbids writable mappings after it."""
    try:
        os.ftruncate(fd, geometry.size)
        arena = Arena(addr, fd, geometry, header)
    except OSError as error:
        raise ArenaError(
            f"optpoline cannot map the arena of process {header.target_pid}: {error.strerror}",
            hint="raise its own limit of address space, or free memory",
        ) from error
    parts = (
        (geometry.counter_off, geometry.size, mmap.PROT_READ | mmap.PROT_WRITE),
        (0, geometry.code_off, mmap.PROT_READ),
        (geometry.code_off, geometry.counter_off, mmap.PROT_READ | mmap.PROT_EXEC),
    )
    for number, (first, last, prot) in enumerate(parts):
        flags = mmap.MAP_SHARED | _MAP_FIXED_NOREPLACE
        result = stop.inject(SYS_MMAP, addr + first, last - first, prot, flags, target_fd, first)
        if result != addr + first:
            # An old kernel takes the address for a hint: undo what it did instead.
            if result >= 0:
                stop.inject(SYS_MUNMAP, result, last - first)
            for done_first, done_last, _ in parts[:number]:
                stop.inject(SYS_MUNMAP, addr + done_first, done_last - done_first)
            arena.close()
            what = (
                f"process {header.target_pid} cannot map {last - first} bytes of an arena "
                f"at {addr + first:#x}"
            )
            if result >= 0 or result == -errno.EEXIST:
                raise AddressTaken(f"{what}: the address was taken meanwhile")
            raise ArenaError(f"{what}: {os.strerror(-result)}", hint=_MAP_HINTS.get(-result))
        if number == 0:
            fcntl.fcntl(fd, _F_ADD_SEALS, _F_SEAL_SHRINK | _F_SEAL_GROW | _F_SEAL_FUTURE_WRITE)
    return arena


def unmap_range(stop: Stop, start: Addr, end: Addr) -> None:
    """Unmap a range of the target.

    Raises:
        ArenaError: if the kernel refuses.
    """
    result = stop.inject(SYS_MUNMAP, start, end - start)
    if result < 0:
        raise ArenaError(f"cannot unmap {start:#x}-{end:#x}: {os.strerror(-result)}")
