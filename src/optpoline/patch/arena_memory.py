# SPDX-License-Identifier: Apache-2.0
"""The memory of an arena as its controller has mapped it: all of it, writable.

Addresses are the program's throughout. What changes while the program runs is changed by
``store_u64``, and by nothing else.
"""

from __future__ import annotations

import mmap
from contextlib import suppress

import numpy as np
from numpy.typing import NDArray

from optpoline.model import CELL_SIZE, Addr

__all__ = ["ArenaMemory"]


class ArenaMemory:
    """The whole of one arena.

    Args:
        addr: Where the program has it.
        fd: Its file, ours; may be closed once this is made.
        size: Its bytes.
    """

    def __init__(self, addr: Addr, fd: int, size: int) -> None:
        """Map it."""
        self.addr = addr
        self.mapped = mmap.mmap(fd, size)
        self._view = memoryview(self.mapped)
        # One aligned native u64 store per item: never torn (see store_u64).
        self._words = self._view.cast("Q")
        self._array = np.frombuffer(self.mapped, np.uint64)

    def close(self) -> None:
        """Unmap it here; the program's stays."""
        # Who catches an exception (Ctrl-C, above all) still holds the frames that it came
        # through, and what they were looking at: then it is unmapped when they are gone.
        with suppress(BufferError):
            self._array = np.zeros(0, np.uint64)
            self._words.release()
            self._view.release()
            self.mapped.close()

    def load_u64(self, addr: Addr) -> int:
        """Return the u64 at an aligned address."""
        return self._words[(addr - self.addr) // CELL_SIZE]

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store the u64 at an aligned address in one store.

        A native-order ``memoryview.cast("Q")`` item store is one 8-byte move:
        never torn in the feasibility study (``struct`` with ``">Q"`` was).
        """
        self._words[(addr - self.addr) // CELL_SIZE] = value

    def read(self, addr: Addr, size: int) -> bytes:
        """Return bytes as they are now."""
        off = addr - self.addr
        return self.mapped[off : off + size]

    def write(self, off: int, data: bytes) -> None:
        """Write bytes at an offset, where nobody reads or runs them yet."""
        self.mapped[off : off + len(data)] = data

    def take_u64(self, indices: NDArray[np.int64]) -> NDArray[np.uint64]:
        """Return the u64 at some indices of its words, as they are now."""
        taken: NDArray[np.uint64] = self._array[indices]
        return taken

    def view_u32(self, addr: Addr, n_words: int) -> NDArray[np.uint32]:
        """Return words themselves, not a copy; let go of them before ``close``."""
        return np.frombuffer(self.mapped, np.uint32, n_words, addr - self.addr)
