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
contexts in memory that no stack leads to. For them the rest of the writable
memory is searched as well, up to a bound; beyond it the ranges are not quiescent
by decision: their memory stays as it is and is reported.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optpoline.errors import TargetFault
from optpoline.model import Addr, Mapping
from optpoline.patch.ranges import AddressRanges, Words
from optpoline.patch.stacks import MAX_STACK_SCAN_SIZE, StackMap, writable_ranges
from optpoline.x86.signal_frame import (
    FRAME_SEGMENTS,
    FRAME_SEGMENTS_MASK,
    FRAME_SP_WORDS,
    RED_ZONE_SIZE,
)

__all__ = ["ThreadPosition", "find_held", "find_words"]

ReadMemory = Callable[[int, int], bytes]

_CHUNK_SIZE = 4 << 20
_PAGE_SIZE = 4096


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


def find_held(
    position: ThreadPosition,
    *,
    read: ReadMemory,
    stacks: StackMap,
    ranges: AddressRanges,
) -> frozenset[int] | None:
    """Return the addresses in ``ranges`` that a thread is at, or may return to.

    Target state: the thread is stopped, or asleep in the kernel.

    Args:
        position: Where it is.
        read: Reads the target's memory.
        stacks: Where stacks may be.
        ranges: Retired code.

    Returns:
        The addresses, or None if it cannot be told: then it may be at any.
    """
    held: set[int] = {position.pc} if position.pc in ranges else set()
    if stacks.range_at(position.sp) is None:
        return None  # a stack that we know nothing of
    todo = [int(position.sp)]
    seen: set[int] = set()
    while todo:
        sp = todo.pop()
        stack = stacks.range_at(sp)
        if stack is None or sp in seen:
            continue
        seen.add(sp)
        stack_start, stack_end = stack
        first = max(stack_start, sp - RED_ZONE_SIZE) & ~7
        if stack_end - first > MAX_STACK_SCAN_SIZE:
            return None
        try:
            words = np.frombuffer(read(first, stack_end - first), dtype="<u8")
        except TargetFault:
            return None
        held.update(ranges.pointing_into(words).tolist())
        todo.extend(_interrupted_stacks(words))
    return frozenset(held)


def _interrupted_stacks(words: Words) -> list[int]:
    """Return the stack pointers saved in what looks like signal frames."""
    at = np.nonzero((words & np.uint64(FRAME_SEGMENTS_MASK)) == np.uint64(FRAME_SEGMENTS))[0]
    at = at[at >= FRAME_SP_WORDS]
    return [int(words[i - FRAME_SP_WORDS]) for i in at]


def find_words(
    *,
    read: ReadMemory,
    maps: Sequence[Mapping],
    skip: Sequence[tuple[int, int]],
    ranges: AddressRanges,
    max_size: int,
) -> frozenset[int] | None:
    """Search writable memory for saved PCs in retired code: any aligned word counts.

    A program that switches stacks may keep a PC anywhere, and bare: a preempting
    handler pushes it on its coroutine's stack and no thread's stack leads there.

    Args:
        read: Reads the target's memory.
        maps: All mappings.
        skip: Ranges that were scanned otherwise, or cannot matter.
        ranges: Retired code.
        max_size: Bytes to search at most.

    Returns:
        The addresses found, or None if there is more memory than ``max_size``.
    """
    memory = writable_ranges([m for m in maps if not _is_inside((m.start, m.end), skip)])
    if sum(last - first for first, last in memory) > max_size:
        return None
    found: set[int] = set()
    for first, last in memory:
        for chunk in range(first, last, _CHUNK_SIZE):
            data = _read_mapped(read, chunk, min(_CHUNK_SIZE, last - chunk))
            words = np.frombuffer(data, dtype="<u8")
            found.update(ranges.pointing_into(words).tolist())
    return frozenset(found)


def _is_inside(one: tuple[int, int], ranges: Sequence[tuple[int, int]]) -> bool:
    """Tell whether a range lies in one of several."""
    return any(first <= one[0] and one[1] <= last for first, last in ranges)


def _read_mapped(read: ReadMemory, addr: int, size: int) -> bytes:
    """Read memory, pages that cannot be read as zeros: no thread keeps a frame there."""
    try:
        return read(addr, size)
    except TargetFault:
        if size <= _PAGE_SIZE:
            return bytes(size)
    pages = range(addr, addr + size, _PAGE_SIZE)
    return b"".join(_read_mapped(read, p, min(_PAGE_SIZE, addr + size - p)) for p in pages)
