# SPDX-License-Identifier: Apache-2.0
"""The format of an arena: what a later controller must be able to read.

An arena is one memfd, mapped into the program in three parts and, as a whole
and writable, into the controller. In address order::

    +0            header        r--   one page
    +HEADER_SIZE  journal       r--   one entry per site ever linked
    +block_off    block table   r--   one entry per block
    +code_off     code          r-x   blocks
    +literal_off  literals      r-x   u64 compare operands
    +counter_off  counters      rw-   u64 cells; data only, steers nothing

The header and the journal are all that is needed to put the program's text
back: an entry is complete before ``n_entries`` counts it, and ``n_entries``
counts it before its site's text is changed. The block table says what else is in
the code part, for whoever looks at it from outside (``optpoline check``, profilers,
debuggers): an entry is complete before its state is ``LIVE``, which it is before
anything leads to its block. All integers are little-endian.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from enum import IntEnum

from optpoline.model import Addr

__all__ = [
    "ARENA_NAME",
    "ARENA_PATH",
    "BLOCK_ENTRY_SIZE",
    "ENTRY_SIZE",
    "HEADER_SIZE",
    "MAGIC",
    "VERSION",
    "ArenaHeader",
    "BlockEntry",
    "BlockKind",
    "BlockState",
    "JournalEntry",
]

ARENA_NAME = "optpoline"
"""Name of the memfd: ``/memfd:optpoline (deleted)`` in ``/proc/PID/maps``."""

ARENA_PATH = f"/memfd:{ARENA_NAME} (deleted)"
"""How its mappings and descriptors are named in /proc."""

MAGIC = b"OPTPOLIN"
VERSION = 2
HEADER_SIZE = 4096
ENTRY_SIZE = 32

BLOCK_ENTRY_SIZE = 40

_HEADER = struct.Struct("<8sIIQQQQQQQQQQ")
_ENTRY = struct.Struct("<QBB6x16s")
_BLOCK = struct.Struct("<QIIQ8sBB6x")


@dataclass(frozen=True, slots=True, kw_only=True)
class ArenaHeader:
    """``struct arena_header`` at offset 0.

    Attributes:
        size: Bytes of the whole arena.
        block_off: Offset of the block table.
        code_off: Offset of the code part.
        literal_off: Offset of the literals.
        counter_off: Offset of the counters.
        controller_pid: Who made it.
        controller_start: Start time of that process, clock ticks since boot; 0 once
            it has let go of what it left here. The u64 at ``CONTROLLER_START_OFF``.
        target_pid: For whom it was made; a forked child finds its parent's pid.
        n_entries: Journal entries that are complete; the u64 at ``N_ENTRIES_OFF``.
        n_blocks: Entries of the block table that were ever used; the u64 at ``N_BLOCKS_OFF``.
        version: Format version.
    """

    size: int
    block_off: int
    code_off: int
    literal_off: int
    counter_off: int
    controller_pid: int
    controller_start: int
    target_pid: int
    n_entries: int
    n_blocks: int = 0
    version: int = VERSION

    CONTROLLER_START_OFF = 8 + 8 + 6 * 8
    N_ENTRIES_OFF = 8 + 8 + 8 * 8
    N_BLOCKS_OFF = 8 + 8 + 9 * 8

    def pack(self) -> bytes:
        """Return the header's bytes."""
        return _HEADER.pack(
            MAGIC,
            self.version,
            HEADER_SIZE,
            self.size,
            self.block_off,
            self.code_off,
            self.literal_off,
            self.counter_off,
            self.controller_pid,
            self.controller_start,
            self.target_pid,
            self.n_entries,
            self.n_blocks,
        )

    @classmethod
    def unpack(cls, data: bytes) -> ArenaHeader | None:
        """Return the header in ``data``, or None if it is none of this version.

        A header whose parts do not lie in order, or whose journal would not end
        before the code, is damaged and is none either.
        """
        if len(data) < _HEADER.size:
            return None
        magic, version, header_size, *numbers = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or header_size != HEADER_SIZE:
            return None
        size, block_off, code_off, literal_off, counter_off, *others = numbers
        pid, start, target, n_entries, n_blocks = others
        if not HEADER_SIZE <= block_off <= code_off <= literal_off <= counter_off <= size:
            return None
        if n_entries > (block_off - HEADER_SIZE) // ENTRY_SIZE:
            return None
        if n_blocks > (code_off - block_off) // BLOCK_ENTRY_SIZE:
            return None
        return cls(
            size=size,
            block_off=block_off,
            code_off=code_off,
            literal_off=literal_off,
            counter_off=counter_off,
            controller_pid=pid,
            controller_start=start,
            target_pid=target,
            n_entries=n_entries,
            n_blocks=n_blocks,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One site that was linked: where it is and what was there before.

    Attributes:
        addr: First byte of the instruction.
        code: Its baseline bytes, at most 16.
        disp_off: Offset of the 32-bit displacement in them.
    """

    addr: Addr
    code: bytes
    disp_off: int

    @property
    def disp_addr(self) -> Addr:
        """Address of the displacement."""
        return Addr(self.addr + self.disp_off)

    @property
    def end(self) -> Addr:
        """Address after the instruction."""
        return Addr(self.addr + len(self.code))

    @property
    def disp(self) -> bytes:
        """The displacement bytes of the baseline."""
        return self.code[self.disp_off : self.disp_off + 4]

    def pack(self) -> bytes:
        """Return the entry's bytes."""
        return _ENTRY.pack(self.addr, len(self.code), self.disp_off, self.code.ljust(16, b"\0"))

    @classmethod
    def unpack(cls, data: bytes) -> JournalEntry:
        """Return the entry in ``data`` (``ENTRY_SIZE`` bytes)."""
        addr, size, disp_off, code = _ENTRY.unpack(data)
        return cls(addr=Addr(addr), code=code[:size], disp_off=disp_off)


class BlockKind(IntEnum):
    """What a block is for."""

    COUNTING = 1
    """Counts each target of its site: a learning window, or a sample of one."""
    PROMOTED = 2
    """The fast path: counts misses only."""


class BlockState(IntEnum):
    """Where a block is in its life."""

    FREE = 0
    """The entry says nothing. Memory of no live or retired block is ``int3``, or was never
    written and is zero."""
    LIVE = 1
    RETIRED = 2
    """Nothing leads to it any more; a thread may still be inside."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """One block: where it is, and what its bytes must be.

    Attributes:
        addr: First byte.
        size: Bytes.
        crc: CRC-32 (zlib) of all its bytes as encoded.
        site_addr: The site it was made for.
        head: Its first 8 bytes as encoded; in memory they may be a redirection.
        kind: What it is for.
        state: Where it is in its life.
    """

    addr: Addr
    size: int
    crc: int
    site_addr: Addr
    head: bytes
    kind: BlockKind
    state: BlockState

    STATE_OFF = 32

    @property
    def end(self) -> Addr:
        """Address after the block."""
        return Addr(self.addr + self.size)

    @property
    def state_word(self) -> int:
        """The last word of the entry, stored at once to change the state."""
        return self.kind | self.state << 8

    def pack(self) -> bytes:
        """Return the entry's bytes."""
        return _BLOCK.pack(
            self.addr, self.size, self.crc, self.site_addr, self.head, self.kind, self.state
        )

    @classmethod
    def unpack(cls, data: bytes) -> BlockEntry | None:
        """Return the entry in ``data`` (``BLOCK_ENTRY_SIZE`` bytes); None if it is free."""
        addr, size, crc, site_addr, head, kind, state = _BLOCK.unpack(data)
        if state == BlockState.FREE or kind not in (1, 2) or state not in (1, 2):
            return None
        return cls(
            addr=Addr(addr),
            size=size,
            crc=crc,
            site_addr=Addr(site_addr),
            head=head,
            kind=BlockKind(kind),
            state=BlockState(state),
        )
