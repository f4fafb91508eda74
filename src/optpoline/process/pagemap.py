# SPDX-License-Identifier: Apache-2.0
"""Which pages of a process exist: the others are zero, or as their file is.

From ``/proc/PID/pagemap`` (Documentation/admin-guide/mm/pagemap.rst), whose flags need
no privilege. Reading a page that does not exist would make it exist.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator

import numpy as np

from optpoline.errors import ProcessGone
from optpoline.process.leader import find_live_tid

__all__ = ["resident_ranges"]

_PAGE_SIZE = 4096
_ENTRY_SIZE = 8
_PRESENT_OR_SWAPPED = np.uint64(0b11 << 62)


def resident_ranges(
    pid: int, ranges: Iterable[tuple[int, int]]
) -> Iterator[tuple[tuple[int, int], ...]]:
    """Return the parts of private mappings that the process has ever written or read.

    Args:
        pid: The process.
        ranges: (first address, address after the last) of each mapping, or part of one.

    Yields:
        For each in turn, its parts.

    Raises:
        ProcessGone: if the process is.
    """
    try:
        fd = os.open(f"/proc/{find_live_tid(pid)}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError:
        fd = -1
    try:
        for start, end in ranges:
            yield _resident_in(pid, fd, start, end)
    finally:
        if fd >= 0:
            os.close(fd)


def _resident_in(pid: int, fd: int, start: int, end: int) -> tuple[tuple[int, int], ...]:
    """Return the resident parts of one range; all of it where that cannot be told."""
    first = start // _PAGE_SIZE
    size = (-(-end // _PAGE_SIZE) - first) * _ENTRY_SIZE
    try:
        data = os.pread(fd, size, first * _ENTRY_SIZE) if fd >= 0 else b""
    except ProcessLookupError as error:
        raise ProcessGone(pid) from error
    except OSError:
        data = b""
    if len(data) != size:
        return ((start, end),)  # not allowed, or no such file: all may exist
    entries = np.frombuffer(data, dtype="<u8")
    exists = np.concatenate(([False], (entries & _PRESENT_OR_SWAPPED) != 0, [False]))
    edges = np.flatnonzero(exists[1:] != exists[:-1]) * _PAGE_SIZE + first * _PAGE_SIZE
    return tuple(
        (max(start, int(one)), min(end, int(other))) for one, other in edges.reshape(-1, 2)
    )
