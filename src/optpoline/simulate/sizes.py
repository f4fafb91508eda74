# SPDX-License-Identifier: Apache-2.0
"""Bytes of blocks and counter cells, by a formula instead of the encoder.

The replay knows no architecture, and a projection asks for a million sites. So
sizes are a base and so much a guard or slot; a test holds the formula against what
the encoder really writes.
"""

from __future__ import annotations

__all__ = [
    "counting_block_size",
    "promoted_block_size",
]

BLOCK_ALIGNMENT = 16

PROMOTED_BASE_SIZE = 13
GUARD_SIZE = 12
TREE_SIZE = 4
"""Bytes: a miss that is counted; a compare with an immediate and a branch; what a guard
of a tree, not of a chain, has in addition on average, int3 that fills lines included."""

MAX_CHAIN = 4


def promoted_block_size(n_targets: int) -> int:
    """Return the bytes of a promoted block, padding included.

    >>> promoted_block_size(1)
    32
    """
    tree_size = TREE_SIZE * max(0, n_targets - MAX_CHAIN)
    return _padded(PROMOTED_BASE_SIZE + GUARD_SIZE * n_targets + tree_size)


COUNTING_BASE_SIZE = 180
COUNTED_HIT_SIZE = 150
SLOT_SIZE = 84
"""Bytes in a counting block of a call site: of all blocks; of a target that is counted, its
section's descriptor included; of a slot. Slots of jump sites, and counts without restartable
sequences, take some 50 and 80."""


def counting_block_size(n_known: int, n_open: int) -> int:
    """Return the bytes of a counting block, padding included."""
    tree_size = (GUARD_SIZE + TREE_SIZE) * n_known
    return _padded(COUNTING_BASE_SIZE + tree_size + COUNTED_HIT_SIZE * n_known + SLOT_SIZE * n_open)


def _padded(size: int) -> int:
    """Return a size with the padding up to the next block."""
    return -(-size // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT
