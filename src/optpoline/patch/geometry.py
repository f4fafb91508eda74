# SPDX-License-Identifier: Apache-2.0
"""How large an arena is, and where its parts lie in it.

What is never used costs address space, not memory.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.patch.layout import BLOCK_ENTRY_SIZE, ENTRY_SIZE, HEADER_SIZE

__all__ = [
    "CODE_PER_SITE_SIZE",
    "JOURNAL_SPARE_ENTRIES",
    "MIN_CODE_SIZE",
    "MIN_ROW_SIZE",
    "ArenaGeometry",
]

_PAGE_SIZE = 4096

CODE_PER_SITE_SIZE = 2048
"""Bytes of code reserved a site: a first learning block is some 320 bytes, a
promoted one 40 to 1,500, and a site that changes needs both again. Pages that
are never used cost address space, not memory."""

MIN_CODE_SIZE = 4 << 20
LITERAL_RATIO = 8
"""Code bytes per literal byte: one 8-byte literal for a 13-byte guard, shared."""
MIN_ROW_SIZE = 512 << 10
"""Bytes of a counter row: half of it for a trace of 65,536 entries, and as many cells as
counting blocks that fill ``MIN_CODE_SIZE`` count in."""
COUNTERS_PER_SITE_SIZE = 384
"""Bytes of a counter row reserved a site, so that all sites may be hot at once. One of two
targets takes 216: 48 for its first learning block, 8 promoted, 160 to be sampled; one of 10
takes 280, and 112 to 512 more for each bigger learning block until that is reclaimed. What
is never used costs address space, times the number of CPUs."""
CODE_PER_BLOCK_SIZE = 64
"""Bytes of code per entry of the block table: a block of one guard takes 32."""
JOURNAL_SPARE_ENTRIES = 4096
"""Entries kept for sites of modules that are loaded later."""


def _round_up(size: int) -> int:
    """Round up to whole pages."""
    return -(-size // _PAGE_SIZE) * _PAGE_SIZE


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaGeometry:
    """Sizes and offsets of an arena's parts, in bytes, all whole pages.

    Attributes:
        block_off: Offset of the block table.
        code_off: Offset of the code.
        literal_off: Offset of the literals.
        counter_off: Offset of the counter rows.
        row_shift: Binary logarithm of the bytes of a row.
        n_cpus: CPUs that have a row, behind the one that all share.
    """

    block_off: int
    code_off: int
    literal_off: int
    counter_off: int
    row_shift: int
    n_cpus: int

    @property
    def size(self) -> int:
        """Bytes of the whole arena."""
        return self.counter_off + (1 + self.n_cpus << self.row_shift)

    @property
    def near_size(self) -> int:
        """Bytes of what blocks name by displacements: all but the rows of the CPUs."""
        return self.counter_off + (1 << self.row_shift)

    @classmethod
    def for_sites(cls, n_sites: int, n_cpus: int) -> ArenaGeometry:
        """Return what ``n_sites`` sites may need over a long session."""
        journal = _round_up((n_sites + JOURNAL_SPARE_ENTRIES) * ENTRY_SIZE)
        code = _round_up(max(MIN_CODE_SIZE, n_sites * CODE_PER_SITE_SIZE))
        block_off = HEADER_SIZE + journal
        code_off = block_off + _round_up(code // CODE_PER_BLOCK_SIZE * BLOCK_ENTRY_SIZE)
        literal_off = code_off + code
        counter_off = literal_off + _round_up(code // LITERAL_RATIO)
        row_size = max(MIN_ROW_SIZE, n_sites * COUNTERS_PER_SITE_SIZE)
        return cls(
            block_off=block_off,
            code_off=code_off,
            literal_off=literal_off,
            counter_off=counter_off,
            row_shift=(row_size - 1).bit_length(),
            n_cpus=n_cpus,
        )
