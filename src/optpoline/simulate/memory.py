# SPDX-License-Identifier: Apache-2.0
"""Bytes of blocks and counter cells that a replay has in use.

A site keeps its first counting block for later learning windows, as the engine
does, and the counting block of its present tree for later samples. What is
replaced counts as freed at once, although that takes a grace period.
"""

from __future__ import annotations

from optpoline.learn.counting import FIRST_OPEN_SLOTS, n_cells
from optpoline.model import CELL_SIZE
from optpoline.simulate.sizes import counting_block_size, promoted_block_size

__all__ = ["BlockMemory"]

_PROMOTED_CELLS = 1
"""Its misses."""


class BlockMemory:
    """The blocks of all sites.

    Args:
        n_cpus: CPUs that counter rows are for.
    """

    def __init__(self, n_cpus: int) -> None:
        """Hold nothing."""
        self._n_rows = 1 + n_cpus
        self._in_use: dict[tuple[int, str], tuple[int, int]] = {}
        self._code_size = self._n_cells = self._peak_cells = 0
        self._shapes: dict[int, tuple[int, int]] = {}
        self.peak_code_size = 0
        """Most bytes of blocks in use at any moment."""
        self.written_code_size = 0
        """Bytes of all blocks ever written."""
        self.n_blocks = 0
        """Blocks ever written."""

    @property
    def peak_table_size(self) -> int:
        """Most bytes of counter cells in use at any moment, all rows."""
        return self._peak_cells * CELL_SIZE * self._n_rows

    def write_counting(self, site: int, n_known: int, n_open: int) -> None:
        """Note that a site counts in a block of that shape; the one it has is used again."""
        if n_known == 0 and n_open <= FIRST_OPEN_SLOTS:
            key = (site, "first")
            if key not in self._in_use:
                self._put(key, counting_block_size(0, n_open), n_cells(0, n_open))
        elif self._shapes.get(site) != (n_known, n_open):
            self._shapes[site] = n_known, n_open
            size = counting_block_size(n_known, n_open)
            self._put((site, "counting"), size, n_cells(n_known, n_open))

    def drop_counting(self, site: int) -> None:
        """Note that a site counts no more, but for its first block."""
        self._shapes.pop(site, None)
        self._take((site, "counting"))

    def write_promoted(self, site: int, n_targets: int) -> None:
        """Note that a site has a new promoted block."""
        self.drop_counting(site)
        self._put((site, "promoted"), promoted_block_size(n_targets), _PROMOTED_CELLS)

    def drop(self, site: int) -> None:
        """Note that a site is back on its thunk."""
        self.drop_counting(site)
        self._take((site, "promoted"))

    def _put(self, key: tuple[int, str], size: int, cells: int) -> None:
        """Write a block in place of another."""
        self._take(key)
        self._in_use[key] = size, cells
        self._code_size += size
        self._n_cells += cells
        self.written_code_size += size
        self.n_blocks += 1
        self.peak_code_size = max(self.peak_code_size, self._code_size)
        self._peak_cells = max(self._peak_cells, self._n_cells)

    def _take(self, key: tuple[int, str]) -> None:
        """Free a block, if there is one."""
        size, cells = self._in_use.pop(key, (0, 0))
        self._code_size -= size
        self._n_cells -= cells
