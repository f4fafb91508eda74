# SPDX-License-Identifier: Apache-2.0
"""Search a program's memory for saved PCs in retired code, and say what they prove.

Any aligned word counts: a program that switches stacks may keep a PC anywhere, and bare (a
preempting handler pushes it on its coroutine's stack, and no thread's stack leads there).
Nothing is left out, threads' stacks neither: one may lie in another, such as a coroutine's
in an array of ``main``. But where a word is tells what it says of the program::

    high  [scanned)     known, if the thread was found to hold it; else somebody else put it
                        there since: proof that threads switch stacks
          sp - 128 ---
    low   [below)       a frame of another stack, or one that a signal left long ago, as every
                        signal does. Who is to come back to the first has its stack pointer,
                        below that frame, saved somewhere: if any word elsewhere points there,
                        it is a suspicion, else nothing
    elsewhere           proof

(A stack pointer that was mangled, as by ``setjmp``, is not found: limits.md.)

While the program stands, what was scanned in the same stop need not be read again.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from optpoline.errors import TargetFault
from optpoline.patch.quiescence import ReadMemory, ThreadScan
from optpoline.patch.ranges import AddressRanges

__all__ = ["Found", "cut_out", "search_memory"]

Range = tuple[int, int]

_CHUNK_SIZE = 4 << 20

HANDLER_REACH = 16 << 10
"""Bytes below a saved PC in which the frames of the handler are looked for that switched stacks.
A handler that does so is a scheduler's: a few hundred bytes deep, and its frame of 1 to 3 KiB."""
_PAGE_SIZE = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """What a search has found.

    Attributes:
        addrs: Addresses in retired code.
        is_proof: Whether the program switches its stacks, as these show.
        is_suspicious: Whether it may, or a signal has left some of them.
    """

    addrs: frozenset[int]
    is_proof: bool
    is_suspicious: bool


def search_memory(
    *,
    read: ReadMemory,
    memory: Iterable[Range],
    scans: Sequence[ThreadScan],
    dead: Sequence[Range] = (),
    ranges: AddressRanges,
    max_size: int,
    is_stopped: bool,
) -> Found | None:
    """Search memory.

    Args:
        read: Reads the target's memory.
        memory: What of it exists and can be written.
        scans: Looks at threads that live.
        dead: Stacks of threads that are gone since they were looked at.
        ranges: Retired code.
        max_size: Bytes to search at most.
        is_stopped: Whether nobody has run since the scans.

    Returns:
        What was found, or None if there is more memory than ``max_size``.
    """
    memory = tuple(memory)
    stacks = [stack for scan in scans for stack in scan.stacks]
    scanned = _union((stack.first, stack.end) for stack in stacks)
    todo: list[Range] = []
    size = 0
    for one in memory:
        parts = cut_out(one, scanned) if is_stopped else [one]
        todo += parts
        size += sum(end - start for start, end in parts)
        if size > max_size:
            return None
    below = _union([*((stack.start, stack.first) for stack in stacks), *dead])
    proof: set[int] = set()
    unclear: set[int] = set()
    left: list[int] = []
    known: set[int] = set()
    for at, word in _find_words(read, todo, ranges):
        if ranges.is_data(word):
            known.add(word)  # what a forked child keeps of another thread's rseq_cs: no saved PC
        elif _is_in(at, scanned):
            over = [scan for scan in scans if any(one.first <= at < one.end for one in scan.stacks)]
            (known if any(word in scan.held for scan in over) else proof).add(word)
        elif _is_in(at, below):
            unclear.add(word)
            left.append(at)
        else:
            proof.add(word)
    if left and not _is_any_saved(read, memory, below, left):
        unclear.clear()
    return Found(
        addrs=frozenset(proof | unclear | known),
        is_proof=bool(proof),
        is_suspicious=bool(unclear),
    )


def _is_any_saved(
    read: ReadMemory, memory: Iterable[Range], below: Sequence[Range], left: Iterable[int]
) -> bool:
    """Tell whether a stack pointer is saved that frames left below a thread's may be for."""
    handlers = AddressRanges((at - HANDLER_REACH, at) for at in left)
    parts = [part for one in memory for part in cut_out(one, below)]
    return any(True for _ in _find_words(read, parts, handlers))


def _find_words(
    read: ReadMemory, memory: Iterable[Range], ranges: AddressRanges
) -> Iterator[tuple[int, int]]:
    """Yield the aligned words of memory that are addresses in ``ranges``: (where, which)."""
    for first, last in memory:
        for chunk in range(first, last, _CHUNK_SIZE):
            data = _read_mapped(read, chunk, min(_CHUNK_SIZE, last - chunk))
            words = np.frombuffer(data, dtype="<u8")
            found = ranges.pointing_into(words)
            if found.size:
                at = np.flatnonzero(np.isin(words, found))
                yield from zip((chunk + 8 * at).tolist(), words[at].tolist(), strict=True)


def cut_out(one: Range, others: Sequence[Range]) -> list[Range]:
    """Return the parts of a range that are in none of ``others``.

    Args:
        one: The range.
        others: In address order, none over another.

    >>> cut_out((0, 30), [(5, 22), (24, 26), (30, 40)])
    [(0, 5), (22, 24), (26, 30)]
    """
    start, end = one
    parts: list[Range] = []
    for i in range(bisect.bisect_right(others, start, key=lambda other: other[1]), len(others)):
        first, last = others[i]
        if first >= end:
            break
        if start < first:
            parts.append((start, first))
        start = last
    if start < end:
        parts.append((start, end))
    return parts


def _is_in(addr: int, ranges: Sequence[Range]) -> bool:
    """Tell whether an address is in one of several ranges in address order."""
    i = bisect.bisect_right(ranges, addr, key=lambda one: one[1])
    return i < len(ranges) and ranges[i][0] <= addr


def _union(ranges: Iterable[Range]) -> list[Range]:
    """Return ranges in address order, those that touch joined."""
    joined: list[Range] = []
    for start, end in sorted(one for one in ranges if one[0] < one[1]):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined


def _read_mapped(read: ReadMemory, addr: int, size: int) -> bytes:
    """Read memory, pages that cannot be read as zeros: no thread keeps a frame there."""
    try:
        return read(addr, size)
    except TargetFault:
        if size <= _PAGE_SIZE:
            return bytes(size)
    pages = range(addr, addr + size, _PAGE_SIZE)
    return b"".join(_read_mapped(read, p, min(_PAGE_SIZE, addr + size - p)) for p in pages)
