# SPDX-License-Identifier: Apache-2.0
"""Clear what a forked child keeps of restartable sequences that its parent was in.

A thread that forks copies the memory of all others, and with it the ``struct rseq`` of each
as it is at that instant. Where a thread was inside a block's sequence, ``rseq_cs`` holds
the address of a descriptor in the arena; in the child there is no such thread. Until the
child starts a thread of its own, whose C library uses that memory again: before Linux 6.14
(commit 'rseq: Fix segfault on registration when rseq_cs is non-zero') the kernel follows
the stale pointer when that thread registers, and kills the child if there is no descriptor
any more. So such words are made 0 before an arena is unmapped.

Which words: aligned as the kernel demands of ``rseq_cs``, the address of a descriptor
exactly, and behind a ``cpu_id`` as it is in a registered or an unregistered area. Nothing
else is written to. It must be after a grace period: then no thread is, or can come back to,
where it would need one. No new ones come to be, as no text leads to the arena, so memory
may be searched while the program runs; a word is compared again before it is cleared, in
the stop in which the arena is unmapped. The field of a living thread, if it is found, is
outside its sequence for good, and 0 is what the kernel would write there next.

Only a process that was forked has any. A thread of the target itself cannot end inside a
sequence: signals are delivered with ``rseq_cs`` cleared, and what ends a thread there ends
the process. Memory that is shared with other processes is left alone: one of them may be
inside the very sequence, and no C library keeps its threads there.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

from optpoline.controller.target import Target
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.patch.ranges import Words
from optpoline.process.memory import Memory, RemoteMemory
from optpoline.process.pagemap import resident_ranges

__all__ = ["clear_stale_sections", "find_stale_sections"]

_CHUNK_SIZE = 4 << 20
_PAGE_SIZE = 4096
_AREA_WORDS = 4
"""``struct rseq`` is aligned to so many u64: CPU numbers, rseq_cs, two more."""
_FIRST_NEGATIVE = np.uint64(1 << 31)


def find_stale_sections(
    target: Target, descriptors: Sequence[Addr], n_cpus: int
) -> tuple[Addr, ...]:
    """Return where private memory of a program holds addresses of descriptors as ``rseq_cs``.

    Target state: running, after a grace period for all code with these descriptors.

    Args:
        target: The process.
        descriptors: Where they are.
        n_cpus: CPU numbers are below that.
    """
    if not descriptors:
        return ()
    wanted = np.array(sorted(descriptors), dtype=np.uint64)
    found: list[Addr] = []
    private = [
        (int(mapping.start), int(mapping.end))
        for mapping in target.read_maps()
        if mapping.perms.startswith("rw") and not mapping.perms.endswith("s")
    ]
    for parts in resident_ranges(target.pid, private):
        for first, last in parts:
            for addr, words in _read_words(target.memory, first, last):
                found += _find_in(addr, words, wanted, n_cpus)
    return tuple(found)


def _find_in(addr: int, words: Words, wanted: Words, n_cpus: int) -> list[Addr]:
    """Return where whole areas at ``addr``, aligned to a page, hold one of ``wanted``."""
    areas = words.reshape(-1, _AREA_WORDS)
    # Nearly no word of a program's memory comes near: two compares settle those.
    near = np.flatnonzero((areas[:, 1] >= wanted[0]) & (areas[:, 1] <= wanted[-1]))
    if not near.size:
        return []
    cpu_ids = areas[near, 0] >> np.uint64(32)
    is_cpu_id = (cpu_ids < np.uint64(n_cpus)) | (cpu_ids >= _FIRST_NEGATIVE)
    hits = near[np.isin(areas[near, 1], wanted) & is_cpu_id]
    return [Addr(addr + 8 * (_AREA_WORDS * int(number) + 1)) for number in hits]


def _read_words(memory: Memory, first: int, last: int) -> Iterator[tuple[int, Words]]:
    """Yield memory in pieces, (address, u64s); pages that cannot be read are left out."""
    for at in range(first, last, _CHUNK_SIZE):
        size = min(_CHUNK_SIZE, last - at)
        try:
            yield at, np.frombuffer(memory.read(at, size), dtype="<u8")
        except TargetFault:
            for page in range(at, at + size, _PAGE_SIZE):
                try:
                    data = memory.read(page, _PAGE_SIZE)
                except TargetFault:
                    continue  # unmapped meanwhile
                yield page, np.frombuffer(data, dtype="<u8")


def clear_stale_sections(
    memory: RemoteMemory, places: Sequence[Addr], descriptors: Sequence[Addr]
) -> int:
    """Make words 0 that still hold the address of a descriptor; return how many.

    Target state: all threads stopped, or asleep in the kernel.
    """
    stale = {int(addr).to_bytes(8, "little") for addr in descriptors}
    n_cleared = 0
    for place in places:
        try:
            if memory.read(place, 8) in stale:
                memory.write(place, bytes(8))
                n_cleared += 1
        except TargetFault:
            continue  # unmapped meanwhile
    return n_cleared
