# SPDX-License-Identifier: Apache-2.0
"""What one look of an audit sees of a process: its memory map and its arenas' contents.

Never-used pages of an arena are not read through the program's mapping, which would make
the kernel allocate them: its memory would grow. Its file's holes are left out instead.
"""

from __future__ import annotations

import bisect
import os
from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.controller.audit_report import Fault, ForeignChange
from optpoline.controller.left_arenas import LeftArena
from optpoline.errors import TargetFault
from optpoline.model import Addr, Mapping
from optpoline.patch.layout import (
    ARENA_PATH,
    BLOCK_ENTRY_SIZE,
    ArenaHeader,
    BlockEntry,
    BlockState,
)
from optpoline.process.leader import find_live_tid
from optpoline.process.memory import Memory, RemoteMemory

__all__ = [
    "ArenaContents",
    "BlockSlot",
    "CodeMap",
    "Evidence",
    "Finding",
    "read_block",
    "read_contents",
    "read_table",
]

Evidence = bytes
"""The entry that a finding is about: it counts only while that stays the same."""


@dataclass(frozen=True, slots=True)
class Finding:
    """Something found in one look.

    Attributes:
        what: A fault or a foreign change.
        evidence: The entry it is about, as read.
    """

    what: Fault | ForeignChange
    evidence: Evidence = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSlot:
    """One entry of a block table.

    Attributes:
        addr: Of the entry itself.
        raw: Its bytes.
        entry: What it says; None if it is free, or none at all.
    """

    addr: Addr
    raw: bytes
    entry: BlockEntry | None

    @property
    def is_damaged(self) -> bool:
        """Whether it is neither free nor an entry."""
        return self.entry is None and self.raw[BlockEntry.STATE_OFF + 1] != BlockState.FREE


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaContents:
    """An arena as it was during one look.

    Attributes:
        arena: Where it is, and its journal.
        header: What its header said.
        before: The block table, read before the code.
        code: The code part, as far as it was ever written; for what is free in it.
        after: The block table, read after the code.
    """

    arena: LeftArena
    header: ArenaHeader
    before: tuple[BlockSlot, ...]
    code: bytes
    after: tuple[BlockSlot, ...]

    @property
    def code_start(self) -> Addr:
        """First address of the code part."""
        return Addr(self.arena.start + self.header.code_off)

    def blocks(self) -> list[BlockEntry]:
        """Return the blocks there were before or after, live or retired."""
        return [slot.entry for slot in (*self.before, *self.after) if slot.entry is not None]


class CodeMap:
    """What the program can execute.

    Args:
        maps: Its memory map.
    """

    def __init__(self, maps: Sequence[Mapping]) -> None:
        """Keep the executable mappings, and those of arenas."""
        self._code = [m for m in maps if m.is_executable and m.path != ARENA_PATH]
        self._starts = [int(m.start) for m in self._code]
        self._arenas = [m for m in maps if m.path == ARENA_PATH]

    def is_code(self, addr: int) -> bool:
        """Tell whether the program can execute an address, arenas left out."""
        at = bisect.bisect_right(self._starts, addr) - 1
        return at >= 0 and addr < self._code[at].end

    def is_arena(self, addr: int) -> bool:
        """Tell whether an address is in an arena."""
        return any(m.start <= addr < m.end for m in self._arenas)


def read_contents(memory: RemoteMemory, arena: LeftArena, header: ArenaHeader) -> ArenaContents:
    """Read an arena's block table, its code, and the table again.

    Raises:
        TargetFault: if it was unmapped meanwhile.
    """
    before = read_table(memory, arena, header)
    code = _read_written(memory.pid, arena, header)
    if code is None:
        ends = [slot.entry.end for slot in before if slot.entry is not None]
        start = arena.start + header.code_off
        size = max(ends, default=start) - start
        if not 0 <= size <= header.literal_off - header.code_off:
            raise TargetFault(start, size, "read", pid=memory.pid)
        code = memory.read(start, size) if size else b""
    return ArenaContents(
        arena=arena,
        header=header,
        before=before,
        code=code,
        after=read_table(memory, arena, header),
    )


def read_block(memory: Memory, slot: BlockSlot, size: int) -> bytes | None:
    """Return a block's bytes, or None if its entry is not, or no longer, that of ``slot``.

    Entry, block and entry again, one right after the other.

    Raises:
        TargetFault: if the arena was unmapped meanwhile.
    """
    if memory.read(slot.addr, BLOCK_ENTRY_SIZE) != slot.raw or slot.entry is None:
        return None
    code = memory.read(slot.entry.addr, size)
    return code if memory.read(slot.addr, BLOCK_ENTRY_SIZE) == slot.raw else None


def read_table(memory: Memory, arena: LeftArena, header: ArenaHeader) -> tuple[BlockSlot, ...]:
    """Read the block table, with entries added since the header was read.

    Raises:
        TargetFault: if the arena was unmapped meanwhile.
    """
    now = ArenaHeader.unpack(memory.read(arena.start, ArenaHeader.N_BLOCKS_OFF + 8))
    n_blocks = header.n_blocks if now is None else now.n_blocks
    start = arena.start + header.block_off
    data = memory.read(start, n_blocks * BLOCK_ENTRY_SIZE) if n_blocks else b""
    slots: list[BlockSlot] = []
    for off in range(0, len(data), BLOCK_ENTRY_SIZE):
        raw = data[off : off + BLOCK_ENTRY_SIZE]
        slots.append(BlockSlot(addr=Addr(start + off), raw=raw, entry=BlockEntry.unpack(raw)))
    return tuple(slots)


def _read_written(pid: int, arena: LeftArena, header: ArenaHeader) -> bytes | None:
    """Read the code part from the arena's file, as far as it was ever written.

    None where the file cannot be had (map_files needs a capability).
    """
    part = next((part for part in arena.parts if part.offset == header.code_off), None)
    if part is None:
        return None
    path = f"/proc/{find_live_tid(pid)}/map_files/{part.start:x}-{part.end:x}"
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError:
        return None
    try:
        return _read_data(fd, header.code_off, header.literal_off)
    except OSError:
        return None
    finally:
        os.close(fd)


def _read_data(fd: int, start: int, end: int) -> bytes:
    """Read a range of a file up to its last data; holes are zeros."""
    code = bytearray()
    off = start
    while off < end:
        try:
            off = os.lseek(fd, off, os.SEEK_DATA)
        except OSError:
            break  # ENXIO: nothing but a hole behind
        if off >= end:
            break
        hole = min(os.lseek(fd, off, os.SEEK_HOLE), end)
        code += bytes(off - start - len(code))
        code += os.pread(fd, hole - off, off)
        off = hole
    return bytes(code)
