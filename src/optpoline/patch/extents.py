# SPDX-License-Identifier: Apache-2.0
"""Hand out and take back parts of a range, the lowest that fits first.

First fit from below keeps what is allocated together close together, which is
what hot blocks want, and leaves the far end of the range untouched for long.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, replace

__all__ = ["Extent", "FreeExtents"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Extent:
    """What was handed out.

    Attributes:
        start: First byte taken, the gap before ``at`` included.
        at: Where the contents go.
        end: After the last byte.
    """

    start: int
    at: int
    end: int


class FreeExtents:
    """The free parts of a range.

    Args:
        start: First free byte.
        end: After the last.
    """

    def __init__(self, start: int, end: int) -> None:
        """Begin with all of it free."""
        self._starts = [start] if start < end else []
        self._ends = [end] if start < end else []
        self.free_size = max(0, end - start)
        """Bytes that are free, in however many pieces."""

    def find(self, size: int, place: Callable[[int], int]) -> Extent | None:
        """Return the lowest room for ``size`` bytes, still free, or None.

        Args:
            size: Bytes.
            place: Rounds a free address up to where contents of that size may start.
        """
        for start, end in zip(self._starts, self._ends, strict=True):
            at = place(start)
            if at + size <= end:
                return Extent(start=start, at=at, end=at + size)
        return None

    def take(self, extent: Extent) -> None:
        """Mark an extent that ``find`` returned as used."""
        self.free_size -= extent.end - extent.start
        i = bisect.bisect_right(self._starts, extent.start) - 1
        if extent.end < self._ends[i]:
            self._starts[i] = extent.end
        else:
            del self._starts[i], self._ends[i]

    def is_free(self, start: int, end: int) -> bool:
        """Tell whether a range is free."""
        i = bisect.bisect_right(self._starts, start) - 1
        return i >= 0 and end <= self._ends[i]

    def extend(self, extent: Extent, end: int) -> Extent | None:
        """Take what is behind an extent as well, up to ``end``; None if that is not free."""
        if not self.is_free(extent.end, end):
            return None
        self.take(Extent(start=extent.end, at=extent.end, end=end))
        return replace(extent, end=end)

    def give(self, extent: Extent) -> None:
        """Take an extent back; neighbours are joined."""
        self.free_size += extent.end - extent.start
        i = bisect.bisect_left(self._starts, extent.start)
        joins_before = i > 0 and self._ends[i - 1] == extent.start
        joins_after = i < len(self._starts) and self._starts[i] == extent.end
        if joins_before and joins_after:
            self._ends[i - 1] = self._ends[i]
            del self._starts[i], self._ends[i]
        elif joins_before:
            self._ends[i - 1] = extent.end
        elif joins_after:
            self._starts[i] = extent.start
        else:
            self._starts.insert(i, extent.start)
            self._ends.insert(i, extent.end)
