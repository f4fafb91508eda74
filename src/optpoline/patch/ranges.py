# SPDX-License-Identifier: Apache-2.0
"""Sets of address ranges, and which words of memory point into them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from numpy.typing import NDArray

__all__ = ["AddressRanges", "Words"]

Words = NDArray[np.uint64]


class AddressRanges:
    """Ranges of addresses.

    Args:
        ranges: (first, after the last) of each; they may overlap, and be empty.
        data: The parts of them that are never executed; likewise.

    >>> ranges = AddressRanges([(0x10, 0x20), (0x40, 0x50)])
    >>> 0x10 in ranges, 0x20 in ranges, 0x4F in ranges
    (True, False, True)
    """

    def __init__(
        self, ranges: Iterable[tuple[int, int]], data: Iterable[tuple[int, int]] = ()
    ) -> None:
        """Sort the ranges and join those that touch."""
        self._data = tuple(sorted(one for one in data if one[0] < one[1]))
        starts: list[int] = []
        ends: list[int] = []
        for start, end in sorted(one for one in ranges if one[0] < one[1]):
            if ends and start <= ends[-1]:
                ends[-1] = max(ends[-1], end)
            else:
                starts.append(start)
                ends.append(end)
        self._starts = np.array(starts, dtype=np.uint64)
        self._ends = np.array(ends, dtype=np.uint64)

    def __len__(self) -> int:
        """Return how many ranges there are, those that touch counted once."""
        return len(self._starts)

    def __contains__(self, addr: int) -> bool:
        """Tell whether an address is in one of them."""
        return bool(self.pointing_into(np.array([addr], dtype=np.uint64)).size)

    def is_data(self, addr: int) -> bool:
        """Tell whether no PC can be at an address: it is in data, not in code."""
        return any(start <= addr < end for start, end in self._data)

    def pointing_into(self, words: Words) -> Words:
        """Return those of ``words`` that are addresses in a range."""
        if not len(self._starts):
            return words[:0]
        # Nearly no word of a program's memory comes near: two compares settle those.
        near: Words = words[(words >= self._starts[0]) & (words < self._ends[-1])]
        if not near.size:
            return near
        at = np.searchsorted(self._starts, near, side="right") - 1
        inside: Words = near[near < self._ends[at]]
        return inside
