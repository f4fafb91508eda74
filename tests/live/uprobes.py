# SPDX-License-Identifier: Apache-2.0
"""Uprobes of ours: breakpoints that the kernel puts into a program, and counts.

perf_event_open(2) with the dynamic PMU "uprobe": config1 is a pointer to the path, config2 the
offset in that file.
"""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path

from optpoline.process.procfs import list_tids, read_maps

__all__ = ["ENOTSUPP", "KIND_PATH", "open_uprobe"]

ENOTSUPP = 524
"""Of the kernel's own errors: no uprobe can be on such an instruction."""

KIND_PATH = Path("/sys/bus/event_source/devices/uprobe/type")
"""Where the kernel has uprobe events."""

_SYS_PERF_EVENT_OPEN = 298
_ATTR = struct.Struct("=IIQQQQQIIQQ")
_ATTR_SIZE = 112


def open_uprobe(pid: int, addr: int) -> int:
    """Install a uprobe for the second thread of a program; return its descriptor.

    Raises:
        OSError: if the kernel does not.
    """
    (mapping,) = (m for m in read_maps(pid) if m.start <= addr < m.end)
    off = addr - mapping.start + mapping.offset
    path = ctypes.create_string_buffer(mapping.path.encode())
    words = (int(KIND_PATH.read_text()), _ATTR_SIZE, 0, 0, 0, 0, 0, 0, 0)
    attr = ctypes.create_string_buffer(_ATTR.pack(*words, ctypes.addressof(path), off), _ATTR_SIZE)
    libc = ctypes.CDLL(None, use_errno=True)
    (tid,) = set(list_tids(pid)) - {pid}
    fd = int(libc.syscall(_SYS_PERF_EVENT_OPEN, attr, tid, -1, -1, 0))
    if fd < 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return fd
