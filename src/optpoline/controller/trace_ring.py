# SPDX-License-Identifier: Apache-2.0
"""The controller's end of a trace: a ring of entries that the program writes.

Every traced branch takes the next number of the ring's head with one locked
instruction, and stores its id where that number points: so numbers are the order of
execution, over all threads. A thread may be held up between the two. Therefore
ids are never 0 and who has read an entry puts 0 there: what is 0 still was not
written yet. Nobody waits for the reader; what he is too slow for is overwritten,
and counted as dropped.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import ArenaError
from optpoline.model import CELL_SIZE, Addr, TraceRing
from optpoline.patch.arena import Arena

__all__ = ["RingMemory", "RingReader", "allocate_ring"]

MAX_ENTRIES = 1 << 16
MIN_ENTRIES = 1 << 10
_ENTRIES_PER_CELL = 2

_HEAD_CELLS = 8
"""A cache line for the head alone: every traced branch writes to it."""


def allocate_ring(arena: Arena) -> TraceRing:
    """Return a ring in an arena's counters, as large as there is room for.

    Raises:
        ArenaError: if there is next to none.
    """
    n_entries = MAX_ENTRIES
    while True:
        try:
            cells_addr = arena.add_counters(_HEAD_CELLS + n_entries // _ENTRIES_PER_CELL)
        except ArenaError:
            if n_entries <= MIN_ENTRIES:
                raise
            n_entries //= 2
            continue
        return TraceRing(
            head_addr=cells_addr,
            entries_addr=Addr(cells_addr + _HEAD_CELLS * CELL_SIZE),
            n_entries=n_entries,
            ids=(),
        )


class RingMemory(Protocol):
    """Where a ring is: an arena."""

    def load_u64(self, addr: Addr) -> int:
        """Return a cell."""

    def view_u32(self, addr: Addr, n_words: int) -> NDArray[np.uint32]:
        """Return words themselves, not a copy."""


class RingReader:
    """Empties one ring.

    Args:
        memory: Where it is.
        ring: The ring.
    """

    def __init__(self, memory: RingMemory, ring: TraceRing) -> None:
        """Look at the ring; nothing is read yet."""
        self._memory = memory
        self._head_addr = ring.head_addr
        self._entries = memory.view_u32(ring.entries_addr, ring.n_entries)
        self._position = 0
        self.n_dropped = 0
        """Entries overwritten before they were read, since ``begin``."""

    def close(self) -> None:
        """Let go of the arena's memory."""
        self._entries = np.zeros(1, np.uint32)

    def clear(self) -> None:
        """Forget all entries; nobody may be writing."""
        self._entries[:] = 0

    def begin(self) -> None:
        """Read on from what is written from now on."""
        self._position = self.head()
        self.n_dropped = 0

    def head(self) -> int:
        """Return how many numbers were ever taken."""
        return self._memory.load_u64(self._head_addr)

    def read(self, head: int) -> NDArray[np.uint32]:
        """Return the ids written since the last read, in their order.

        It stops at an entry that is not written yet: its thread is under way, or held up.
        With half a ring waiting behind it, it is left out and counted as dropped.

        Args:
            head: Read up to here; a value of ``head()``.
        """
        n = len(self._entries)
        first = max(self._position, head - n)
        self.n_dropped += first - self._position
        found = np.concatenate([self._entries[piece] for piece in self._pieces(first, head)])
        # What was written again while we copied is not what it was.
        n_lost = min(len(found), max(0, self.head() - n - first))
        self.n_dropped += n_lost
        found, first = found[n_lost:], first + n_lost
        # Most of the time there is no hole, and minimum is quicker than looking for one.
        has_hole = len(found) > 0 and not found.min()
        if has_hole and head - first <= n // 2:
            found = found[: int(np.argmin(found))]
        for piece in self._pieces(first, first + len(found)):
            self._entries[piece] = 0
        self._position = first + len(found)
        if not has_hole or head - first <= n // 2:
            return found
        written: NDArray[np.uint32] = found[found != 0]
        self.n_dropped += len(found) - len(written)
        return written

    def _pieces(self, first: int, last: int) -> tuple[slice, slice]:
        """Return where the entries with numbers first..last-1 are, one lap at most."""
        n = len(self._entries)
        begin = first & (n - 1)
        end = begin + last - first
        return slice(begin, min(n, end)), slice(0, max(0, end - n))
