# SPDX-License-Identifier: Apache-2.0
"""Take counts out of shared memory while others count there, by code of our own.

The code (``x86/fetch_code.py``, which says why it is exact) is mapped read-only and executable
from a memory file and called on the calling thread. It uses the thread's own rseq area, which
glibc registers from 2.35 on; without one, ``has_sections`` is false and only what needs none
is left.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import UnsupportedTarget
from optpoline.process.host_cpu import EXECUTABLE_FORBIDDEN
from optpoline.x86.fetch_code import (
    FREE_PAIRS_OFF,
    SUBTRACT_OFF,
    TAKE_COUNTS_OFF,
    assemble_fetch_code,
)

__all__ = ["CellFetcher", "current_cpu"]

MAX_ABORTS = 10_000
"""Restarts of one call before it is given up. A thread that is preempted every millisecond is
aborted a few times a second; one that a debugger steps through, at every instruction."""

_MFD_NOEXEC_SEAL = 8
_MAP_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p


class _Take(Protocol):
    """The type of the two functions that use a sequence."""

    def __call__(
        self, cells: int, out: int, n: int, cpu: int, rseq_off: int, n_aborts: int, /
    ) -> int:
        """Return how many were dealt with."""


class _Subtract(Protocol):
    """The type of the function that uses none."""

    def __call__(self, cells: int, out: int, n: int, mask: int, /) -> None:
        """Take from each cell what it holds of the mask."""


class CellFetcher:
    """The code, mapped; use as a context manager or call ``close``.

    Cells are given by their addresses in our own memory, as u64 arrays. What is taken from cell
    i is added to ``out[i]``; nothing else of ``out`` is written.
    """

    def __init__(self) -> None:
        """Map the code.

        Raises:
            UnsupportedTarget: if this process may not map executable memory.
        """
        self._addr = _map_code()
        u64, word = ctypes.c_uint64, ctypes.c_void_p
        take = ctypes.CFUNCTYPE(
            u64, word, word, u64, ctypes.c_uint32, ctypes.c_int64, ctypes.c_uint64
        )
        self._take_counts: _Take = take(self._addr + TAKE_COUNTS_OFF)
        self._free_pairs: _Take = take(self._addr + FREE_PAIRS_OFF)
        self._subtract: _Subtract = ctypes.CFUNCTYPE(None, word, word, u64, u64)(
            self._addr + SUBTRACT_OFF
        )
        self._rseq_off = _find_own_rseq()

    @property
    def has_sections(self) -> bool:
        """Whether threads of this process have an rseq area."""
        return self._rseq_off is not None

    def take_counts(self, cells: NDArray[np.uint64], out: NDArray[np.uint64], cpu: int) -> int:
        """Fetch and zero cells of the row of the CPU that this thread runs on.

        Returns:
            How many cells, from the first on, are done; fewer than asked for if this thread
            is on another CPU or has been aborted ``MAX_ABORTS`` times.
        """
        return self._in_sections(self._take_counts, cells, out, cpu)

    def free_pairs(self, pairs: NDArray[np.uint64], out: NDArray[np.uint64], cpu: int) -> int:
        """Fetch the counts of claimed slots and free them; the same otherwise.

        Args:
            pairs: Addresses of the slots' target cells; their counts are behind those.
            out: Counts, as above. One that was not done may have got a part of its count.
            cpu: Whose row it is.
        """
        return self._in_sections(self._free_pairs, pairs, out, cpu)

    def _in_sections(
        self, function: _Take, cells: NDArray[np.uint64], out: NDArray[np.uint64], cpu: int
    ) -> int:
        """Call one of the two functions."""
        if self._rseq_off is None:
            return 0
        _check_arrays(cells, out)
        data = cells.ctypes.data, out.ctypes.data
        return function(*data, len(cells), cpu, self._rseq_off, MAX_ABORTS)

    def subtract(
        self, cells: NDArray[np.uint64], out: NDArray[np.uint64], mask: int = 2**64 - 1
    ) -> None:
        """Fetch cells that others add to with locked instructions, and subtract what was read.

        Args:
            cells: Addresses of the cells.
            out: What was taken away is added here.
            mask: Bits of a cell that are its count; the others stay.
        """
        _check_arrays(cells, out)
        self._subtract(cells.ctypes.data, out.ctypes.data, len(cells), mask)

    def close(self) -> None:
        """Unmap the code."""
        if self._addr:
            _libc.munmap(ctypes.c_void_p(self._addr), ctypes.c_size_t(mmap.PAGESIZE))
            self._addr = 0

    def __enter__(self) -> CellFetcher:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Unmap the code."""
        self.close()


def current_cpu() -> int:
    """Return the CPU that the calling thread is on right now."""
    return int(_libc.sched_getcpu())


def _check_arrays(cells: NDArray[np.uint64], out: NDArray[np.uint64]) -> None:
    """Check what the code relies on: it knows no bounds."""
    for array in (cells, out):
        if array.dtype != np.uint64 or not array.flags.c_contiguous or array.ndim != 1:
            raise ValueError("cells and counts must be contiguous u64 arrays")
    if len(cells) != len(out) or not out.flags.writeable:
        raise ValueError("there must be one writable count for each cell")


def _find_own_rseq() -> int | None:
    """Return the offset of this process's rseq areas from the thread pointer, or None.

    glibc says it since 2.35, and a size of 0 where it registers none (a tunable).
    """
    try:
        size = ctypes.c_uint.in_dll(_libc, "__rseq_size").value
        off = ctypes.c_ssize_t.in_dll(_libc, "__rseq_offset").value
    except ValueError:
        return None
    return int(off) if size else None


def _map_code() -> int:
    """Map the code and return its address."""
    try:
        fd = os.memfd_create("optpoline-fetch", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create("optpoline-fetch", os.MFD_CLOEXEC)  # before Linux 6.3
    try:
        os.ftruncate(fd, mmap.PAGESIZE)
        addr = _libc.mmap(
            None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC,
            mmap.MAP_SHARED, fd, ctypes.c_long(0),
        )  # fmt: skip
        if addr is None or addr == _MAP_FAILED:
            raise UnsupportedTarget(
                "optpoline may not map its own code that fetches counts", hint=EXECUTABLE_FORBIDDEN
            )
        # Its own addresses are in it, so it is written, through the file, once it has one.
        os.pwrite(fd, assemble_fetch_code(addr), 0)
    finally:
        os.close(fd)
    return int(addr)
