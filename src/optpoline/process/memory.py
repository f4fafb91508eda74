# SPDX-License-Identifier: Apache-2.0
"""Memory of a running target.

Reads and text writes go through one descriptor of ``/proc/PID/mem``. It stays
bound to the address space it was opened on: after an exec it reads nothing
rather than another program's bytes.
"""

from __future__ import annotations

import ctypes
import errno
import os
from typing import Protocol, Self

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone, TargetFault
from optpoline.process.leader import find_live_tid

__all__ = ["Memory", "RemoteMemory", "store_data"]

_MAX_OFFSET = (1 << 63) - 1  # pread takes a signed offset; addresses above are the kernel's
_libc = ctypes.CDLL(None, use_errno=True)


class Memory(Protocol):
    """Anything that bytes can be read from by address."""

    def read(self, addr: int, size: int) -> bytes:
        """Return exactly size bytes, or raise TargetFault."""
        ...


class RemoteMemory:
    """The memory of one process.

    Args:
        pid: Process (or thread) id.

    Raises:
        ProcessGone: if it does not exist.
        PermissionDenied: if we may not trace it, or have no descriptor left.
    """

    def __init__(self, pid: int) -> None:
        """Open the memory."""
        self.pid = pid
        try:
            self._fd = os.open(f"/proc/{find_live_tid(pid)}/mem", os.O_RDWR | os.O_CLOEXEC)
        except (FileNotFoundError, ProcessLookupError) as error:
            raise ProcessGone(pid) from error
        except PermissionError as error:
            raise PermissionDenied(f"we may not read the memory of process {pid}") from error
        except OSError as error:
            message = f"the memory of process {pid} cannot be opened: {error.strerror}"
            if error.errno in (errno.EMFILE, errno.ENFILE):
                raise PermissionDenied(message) from error
            raise OptpolineError(message) from error

    def __enter__(self) -> Self:
        """Return itself; the memory is closed at the end."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close the memory."""
        self.close()

    def close(self) -> None:
        """Close the descriptor; harmless when done twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    def is_current(self) -> bool:
        """Say whether the address space still lives: no exit, no exec since it was opened."""
        try:
            # The zero page cannot be mapped by ordinary programs; either answer will do.
            return bool(os.pread(self._fd, 1, 0))
        except OSError:
            return True  # EIO: an address space, with nothing at 0

    def read(self, addr: int, size: int) -> bytes:
        """Return exactly size bytes from an address.

        Raises:
            TargetFault: if any of them cannot be read.
            ProcessGone: if the address space no longer exists.
        """
        if not 0 <= addr <= _MAX_OFFSET:
            raise TargetFault(addr, size, "read", pid=self.pid)
        data = b""
        while len(data) < size:
            try:
                chunk = os.pread(self._fd, size - len(data), addr + len(data))
            except OSError as error:
                raise TargetFault(addr, size, "read", pid=self.pid) from error
            if not chunk:
                raise ProcessGone(self.pid, f"process {self.pid} has exited or run a new program")
            data = data + chunk if data else chunk
        return data

    def write(self, addr: int, data: bytes) -> None:
        """Write with one pwrite, through page protection (works on program text).

        On error: when the range crosses pages, a first part may be written.

        Raises:
            TargetFault: if not all bytes could be written.
            ProcessGone: if the address space no longer exists.
        """
        if not 0 <= addr <= _MAX_OFFSET:
            raise TargetFault(addr, len(data), "written", pid=self.pid)
        try:
            n_written = os.pwrite(self._fd, data, addr)
        except OSError as error:
            raise TargetFault(addr, len(data), "written", pid=self.pid) from error
        if n_written == 0 and data:
            raise ProcessGone(self.pid, f"process {self.pid} has exited or run a new program")
        if n_written != len(data):
            raise TargetFault(addr, len(data), "written", pid=self.pid)


class _IoVec(ctypes.Structure):
    """Struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


def store_data(tid: int, addr: int, data: bytes) -> None:
    """Write as the thread itself could: page protection holds (process_vm_writev).

    Unlike ``RemoteMemory.write`` this faults on a guard page.

    Raises:
        TargetFault: if not all bytes could be written.
    """
    buffer = ctypes.create_string_buffer(data, len(data))
    local = _IoVec(ctypes.addressof(buffer), len(data))
    remote = _IoVec(addr, len(data))
    n_written = _libc.process_vm_writev(
        tid, ctypes.byref(local), ctypes.c_ulong(1), ctypes.byref(remote), ctypes.c_ulong(1),
        ctypes.c_ulong(0),
    )  # fmt: skip
    if n_written != len(data):
        raise TargetFault(addr, len(data), "written")
