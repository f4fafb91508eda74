# SPDX-License-Identifier: Apache-2.0
"""Which pages of a process exist: the others are zero, or as their file is.

From ``/proc/PID/pagemap`` (Documentation/admin-guide/mm/pagemap.rst), whose flags need
no privilege. Reading a page that does not exist would make it exist.
"""

from __future__ import annotations

import os

import numpy as np

from optpoline.errors import ProcessGone
from optpoline.process.leader import find_live_tid

__all__ = ["resident_ranges"]

_PAGE_SIZE = 4096
_ENTRY_SIZE = 8
_PRESENT_OR_SWAPPED = np.uint64(0b11 << 62)


def resident_ranges(pid: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Return the parts of a private mapping that the process has ever written or read.

    Args:
        pid: The process.
        start: First address of the mapping.
        end: Address after it.

    Raises:
        ProcessGone: if the process is.
    """
    try:
        fd = os.open(f"/proc/{find_live_tid(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            size = (end - start) // _PAGE_SIZE * _ENTRY_SIZE
            data = os.pread(fd, size, start // _PAGE_SIZE * _ENTRY_SIZE)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError:
        return ((start, end),)  # not allowed, or no such file: all may exist
    if len(data) != size:
        return ((start, end),)
    entries = np.frombuffer(data, dtype="<u8")
    exists = np.concatenate(([False], (entries & _PRESENT_OR_SWAPPED) != 0, [False]))
    edges = np.flatnonzero(exists[1:] != exists[:-1]) * _PAGE_SIZE + start
    return tuple((int(first), int(last)) for first, last in edges.reshape(-1, 2))
