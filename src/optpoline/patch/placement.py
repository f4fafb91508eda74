# SPDX-License-Identifier: Apache-2.0
"""Choose where an arena goes, so that direct branches reach from and to it.

``rel32`` reaches 2 GiB. The arena must reach every byte of the modules it
serves; a gap below them is preferred, because what lies above a program is its
heap, which must stay free to grow.
"""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.model import Addr, Mapping

__all__ = ["choose_arena_addr", "is_within_reach"]

REACH_SIZE = (1 << 31) - (1 << 20)
"""Bytes that a branch is trusted to reach: 2 GiB less 1 MiB for both ends' own size."""

MIN_ADDR = 1 << 20
"""Lowest address used; above any mmap_min_addr (65,536 by default)."""

HEAP_ROOM_SIZE = 1 << 30
"""Bytes above a mapping that are left free where an arena must go above it, so
that a heap (brk) can grow; the far end of what is still within reach."""

STACK_ROOM_SIZE = 256 << 20
"""Bytes left free below the main stack, which grows down."""

GUARD_SIZE = 1 << 17
"""Bytes left free on each side, so that neighbours cannot be merged or run into
it; rounding down to ``ADDR_ALIGNMENT`` takes up to half of it."""

ADDR_ALIGNMENT = 1 << 16
"""Arenas start at multiples of this, in bytes."""

USER_END = 0x7FFF_FFFF_F000
"""Address after the last that mmap gives without being asked for more (TASK_SIZE
with 4-level page tables); ``[vsyscall]`` lies far above it."""


def is_within_reach(one_addr: int, other_addr: int) -> bool:
    """Tell whether a direct branch at one address reaches the other.

    >>> is_within_reach(0x400000, 0x40000000), is_within_reach(0x400000, 0x7f0000000000)
    (True, False)
    """
    return abs(one_addr - other_addr) < REACH_SIZE


def choose_arena_addr(
    maps: Sequence[Mapping], start: int, end: int, size: int, near_size: int | None = None
) -> Addr | None:
    """Return an address for an arena of ``size`` bytes, or None if there is no room.

    Args:
        maps: All mappings of the target, in address order.
        start: First address the arena must reach.
        end: Address after the last it must reach.
        size: Bytes, a multiple of the page size.
        near_size: How many of them, from the first on, must be within reach; None for all.
    """
    near_size = size if near_size is None else near_size
    lowest = max(MIN_ADDR, end - REACH_SIZE)
    highest = start + REACH_SIZE - near_size
    below: list[int] = []
    above: list[int] = []
    for gap_start, gap_end in _gaps(maps):
        first = max(gap_start + GUARD_SIZE, lowest)
        last = min(gap_end - GUARD_SIZE - size, highest)
        if first > last:
            continue
        if gap_end <= start:
            below.append(last)
        else:
            above.append(min(last, max(first, gap_start + HEAP_ROOM_SIZE)))
    if below:
        return Addr(max(below) & -ADDR_ALIGNMENT)
    if above:
        return Addr(min(above) & -ADDR_ALIGNMENT)
    return None


def _gaps(maps: Sequence[Mapping]) -> list[tuple[int, int]]:
    """Return the free ranges between mappings, stack growth kept out."""
    gaps: list[tuple[int, int]] = []
    previous_end: int = 0
    for mapping in maps:
        gap_end = min(int(mapping.start), USER_END)
        if mapping.path == "[stack]":
            gap_end -= STACK_ROOM_SIZE
        if gap_end > previous_end:
            gaps.append((previous_end, gap_end))
        previous_end = mapping.end
    if previous_end < USER_END:
        gaps.append((previous_end, USER_END))
    return gaps
