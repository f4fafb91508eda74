# SPDX-License-Identifier: Apache-2.0
"""Find who may still be inside ranges of code: the rule of grace periods.

A thread is quiescent for retired blocks when its PC is outside **and** no PC
saved by an interrupted frame is inside. Blocks make no return addresses
(design rule 4), so a saved PC can only be in a signal frame; a conservative
scan of every word of the stack, from the red zone up, finds it wherever it is.

A signal handler may run on another stack than the code it interrupted. The
frame says where that was: the scan recognises signal frames by the saved
segment registers and follows the stack pointer saved beside them.

Programs that switch stacks by themselves (swapcontext, coroutines) keep
contexts in memory that no stack leads to, on other threads' stacks too: for
them memory is searched (``patch/memory_search.py``). So a scan may be bounded;
what it leaves out the search does not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.patch.ranges import AddressRanges, Words
from optpoline.patch.stacks import StackMap
from optpoline.x86.signal_frame import FRAME_SEGMENTS, FRAME_SEGMENTS_MASK, FRAME_SP_WORDS

__all__ = [
    "FindResident",
    "ReadMemory",
    "ScannedStack",
    "ThreadPosition",
    "ThreadScan",
    "interrupted_stacks",
    "scan_thread",
]

ReadMemory = Callable[[int, int], bytes]

FindResident = Callable[[int, int], Iterable[tuple[int, int]]]
"""Returns the parts of a range of memory that exist, in address order."""

_DIRECT_SIZE = 256 << 10
"""A scan no larger than this reads all: nearly all of it exists, and to ask takes longer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ThreadPosition:
    """Where one thread is, while it cannot run.

    Attributes:
        tid: Thread id.
        pc: Program counter.
        sp: Stack pointer.
    """

    tid: int
    pc: Addr
    sp: Addr


@dataclass(frozen=True, slots=True)
class ScannedStack:
    """A stack as threads have it (``Stack.is_own``) that a scan has been over.

    Attributes:
        start: First address of its mapping; below ``first`` nothing was looked at.
        first: First address scanned: the red zone of the lowest frame.
        end: Address after the last one scanned.
    """

    start: int
    first: int
    end: int


@dataclass(frozen=True, slots=True)
class ThreadScan:
    """What a look at one thread has found.

    Attributes:
        held: Addresses in retired code that it is at, or may return to.
        stacks: The stacks of threads' own that were scanned for that.
    """

    held: frozenset[int]
    stacks: tuple[ScannedStack, ...]


def scan_thread(
    position: ThreadPosition,
    *,
    read: ReadMemory,
    find_resident: FindResident,
    stacks: StackMap,
    ranges: AddressRanges,
) -> ThreadScan | None:
    """Find the addresses in ``ranges`` that a thread is at, or may return to.

    Target state: the thread is stopped, or asleep in the kernel.

    Args:
        position: Where it is.
        read: Reads the target's memory.
        find_resident: Tells which memory exists.
        stacks: Where stacks may be.
        ranges: Retired code.

    Returns:
        What was found, or None if it cannot be told: then it may be at any.
    """
    if stacks.range_at(position.sp) is None:
        return None  # a stack that we know nothing of
    held: set[int] = {position.pc} if position.pc in ranges else set()
    scanned: list[ScannedStack] = []
    todo = [int(position.sp)]
    seen: list[tuple[int, int]] = []
    while todo:
        sp = todo.pop()
        stack, extent = stacks.stack_at(sp), stacks.scan_range_at(sp)
        if stack is None or extent is None:
            continue
        first, end = extent
        if any(start <= first and end <= last for start, last in seen):
            continue
        seen.append(extent)
        try:
            for part in _parts(first, end, find_resident):
                words = np.frombuffer(read(part[0], part[1] - part[0]), dtype="<u8")
                held.update(ranges.pointing_into(words).tolist())
                todo.extend(interrupted_stacks(words))
        except TargetFault:
            return None
        if stack.is_own:
            scanned.append(ScannedStack(stack.start, first, end))
    return ThreadScan(frozenset(held), tuple(scanned))


def _parts(first: int, end: int, find_resident: FindResident) -> Sequence[tuple[int, int]]:
    """Return what has to be read of a range, neighbours joined."""
    if end - first <= _DIRECT_SIZE:
        return ((first, end),)
    parts: list[tuple[int, int]] = []
    for start, last in find_resident(first, end):
        if parts and parts[-1][1] == start:
            parts[-1] = (parts[-1][0], last)
        else:
            parts.append((start, last))
    return parts


def interrupted_stacks(words: Words) -> list[int]:
    """Return the stack pointers saved in what looks like signal frames."""
    at = np.nonzero((words & np.uint64(FRAME_SEGMENTS_MASK)) == np.uint64(FRAME_SEGMENTS))[0]
    at = at[at >= FRAME_SP_WORDS]
    return [int(words[i - FRAME_SP_WORDS]) for i in at]
