# SPDX-License-Identifier: Apache-2.0
"""Where the rseq descriptors of an arena's blocks are: data that lies among its code.

A descriptor (struct rseq_cs of include/uapi/linux/rseq.h) lies behind the instructions of
its block and is never executed, so a word of the program that is its address is no saved
PC. It is what a thread's ``rseq_cs`` holds inside a restartable sequence, and what a forked
child keeps of a thread of its parent that was inside one (``controller/stale_sections.py``).

The bytes themselves have the last word: the block table is read while another controller
may change it, and what looks like a descriptor of the block before it is no instruction.
"""

from __future__ import annotations

import struct
from collections.abc import Iterable, Sequence

from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.patch.layout import HEADER_SIZE, ArenaHeader, BlockEntry
from optpoline.patch.used_code import read_blocks
from optpoline.process.memory import Memory

__all__ = ["DESCRIPTOR_SIZE", "cut_out_descriptors", "find_descriptors"]

_DESCRIPTOR = struct.Struct("<IIQQQ")
"""struct rseq_cs: version, flags, start_ip, post_commit_offset, abort_ip."""

DESCRIPTOR_SIZE = _DESCRIPTOR.size
"""Bytes of a descriptor, and what its address is a multiple of."""


def find_descriptors(memory: Memory, arena_addr: Addr) -> tuple[Addr, ...]:
    """Return the addresses of all descriptors in an arena, in address order.

    Args:
        memory: The program's.
        arena_addr: Where it has the arena; one that cannot be read has none.
    """
    try:
        header = ArenaHeader.unpack(memory.read(arena_addr, HEADER_SIZE))
        if header is None or header.rseq is None or not header.n_blocks:
            return ()
        found = read_blocks(memory, arena_addr, header)
        code_start = arena_addr + header.code_off
        used_end = max((block.end for block in found), default=code_start)
        code = memory.read(code_start, used_end - code_start)
    except TargetFault:
        return ()
    addrs = {at for block in found for at in _find_in_block(block, code, code_start)}
    return tuple(Addr(addr) for addr in sorted(addrs))


def _find_in_block(block: BlockEntry, code: bytes, code_start: int) -> Iterable[int]:
    """Yield the addresses of a block's descriptors."""
    text_end = block.addr + block.text_size
    first = -(-text_end // DESCRIPTOR_SIZE) * DESCRIPTOR_SIZE
    for at in range(first, block.end - DESCRIPTOR_SIZE + 1, DESCRIPTOR_SIZE):
        version, flags, start, length, abort = _DESCRIPTOR.unpack_from(code, at - code_start)
        if version == flags == 0 and block.addr <= start < start + length < abort < text_end:
            yield at


def cut_out_descriptors(
    ranges: Iterable[tuple[Addr, Addr]], descriptors: Sequence[Addr]
) -> list[tuple[Addr, Addr]]:
    """Return the parts of ranges of code in which a PC may be.

    Args:
        ranges: (first, after the last) of each.
        descriptors: Their addresses, in address order.

    >>> cut_out_descriptors([(Addr(0), Addr(96)), (Addr(128), Addr(160))], [Addr(32), Addr(128)])
    [(0, 32), (64, 96)]
    """
    parts: list[tuple[Addr, Addr]] = []
    for start, end in ranges:
        first = start
        for descriptor in descriptors:
            if start <= descriptor < end:
                parts.append((first, descriptor))
                first = Addr(descriptor + DESCRIPTOR_SIZE)
        parts.append((first, end))
    return [(first, end) for first, end in parts if first < end]
