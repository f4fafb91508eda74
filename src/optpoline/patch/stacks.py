# SPDX-License-Identifier: Apache-2.0
"""Which memory of a program holds stacks, found fast for thousands of threads."""

from __future__ import annotations

import bisect
from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.model import Mapping
from optpoline.process.own_stack import MAX_STACK_SIZE, is_thread_stack
from optpoline.x86.signal_frame import RED_ZONE_SIZE

__all__ = [
    "MAX_NEIGHBOUR_SCAN_SIZE",
    "MAX_STACK_SCAN_SIZE",
    "Stack",
    "StackMap",
    "writable_ranges",
]

MAX_STACK_SCAN_SIZE = MAX_STACK_SIZE
"""Bytes of one stack that are scanned, resident or not; the rest is memory like any other."""

MAX_NEIGHBOUR_SCAN_SIZE = 8 << 20
"""The same beyond the end of a thread's own mapping, and on any other stack: as much as a
stack has by default. What lies there may be the heap."""


@dataclass(frozen=True, slots=True)
class Stack:
    """The mapping that a stack pointer is in.

    Attributes:
        start: Its first address.
        end: Address after it.
        is_own: Whether it looks like the stack of a thread, made by the kernel or pthreads.
    """

    start: int
    end: int
    is_own: bool


class StackMap:
    """The memory in which threads may have their stacks.

    Args:
        maps: All mappings of the program, in address order.
    """

    def __init__(self, maps: Sequence[Mapping]) -> None:
        """Index the mappings."""
        self._maps = maps
        self._starts = [int(mapping.start) for mapping in maps]
        self._ranges = writable_ranges(maps)
        self._range_starts = [start for start, _ in self._ranges]

    def range_at(self, addr: int) -> tuple[int, int] | None:
        """Return the range of readable and writable memory around an address, or None."""
        at = bisect.bisect_right(self._range_starts, addr) - 1
        return self._ranges[at] if at >= 0 and addr < self._ranges[at][1] else None

    def scan_range_at(self, sp: int) -> tuple[int, int] | None:
        """Return what to scan for a stack pointer, from the red zone up; None: no stack there."""
        around, stack = self.range_at(sp), self.stack_at(sp)
        if around is None or stack is None:
            return None
        first = max(around[0], sp - RED_ZONE_SIZE) & ~7
        end = max(first + MAX_NEIGHBOUR_SCAN_SIZE, stack.end if stack.is_own else 0)
        return first, min(around[1], end, first + MAX_STACK_SCAN_SIZE)

    def stack_at(self, sp: int) -> Stack | None:
        """Return the mapping that a stack is in, and whether it is one as a thread has it.

        That is the main stack, or a mapping above a guard page as pthreads have it. Other
        stacks may lie in it all the same, such as an array in a function that has not
        returned. None for memory that was mapped later.
        """
        at = bisect.bisect_right(self._starts, sp) - 1
        if at < 0 or sp >= self._maps[at].end:
            return None
        mapping, below = self._maps[at], self._maps[at - 1] if at else None
        return Stack(int(mapping.start), int(mapping.end), is_thread_stack(mapping, below))


def writable_ranges(maps: Sequence[Mapping]) -> list[tuple[int, int]]:
    """Return readable and writable memory, neighbours joined.

    One stack can lie in several mappings: mlock or madvise of a part splits it.
    """
    ranges: list[tuple[int, int]] = []
    for mapping in maps:
        if not mapping.perms.startswith("rw"):
            continue
        if ranges and ranges[-1][1] == mapping.start:
            ranges[-1] = (ranges[-1][0], int(mapping.end))
        else:
            ranges.append((int(mapping.start), int(mapping.end)))
    return ranges
