# SPDX-License-Identifier: Apache-2.0
"""The format of an arena: what a later controller must be able to read.

An arena is one memfd, mapped into the program in three parts and, as a whole
and writable, into the controller. In address order::

    +0            header        r--   one page
    +HEADER_SIZE  journal       r--   one entry per site ever linked
    +block_off    block table   r--   one entry per block
    +code_off     code          r-x   blocks
    +literal_off  literals      r-x   u64 compare operands
    +counter_off  counters      rw-   rows of u64 cells; data only, steers nothing

The counters are ``1 + n_cpus`` rows of ``1 << row_shift`` bytes each::

    row 0         shared by all: counted in with locked instructions by whoever
                  cannot use its CPU's row
    row 1 + cpu   of that CPU alone: counted in without a lock, by threads that run there
                  and start again when they are moved away (restartable sequences), or
                  with one where the C library registers none

A cell has one address, its address in row 0; the cell of a CPU lies ``(1 + cpu) <<
row_shift`` bytes behind it. So the cells of different sites lie close together, CPUs
share no cache line, and memory is used only where a CPU has counted: 8 bytes a cell and
CPU, in whole pages. A count is the sum over all rows. In row 0, bit 63 of a slot's count
says that the slot is taken; it is no part of the count.

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

from optpoline.model import Addr, CounterRows, RseqAbi, Site
from optpoline.x86.assembler import REGISTER_NUMBERS
from optpoline.x86.plain_branches import decode_plain_branch

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
VERSION = 5
HEADER_SIZE = 4096
ENTRY_SIZE = 32

BLOCK_ENTRY_SIZE = 40

MIN_ROW_SHIFT, MAX_ROW_SHIFT = 12, 40
"""A row is whole pages; more than a TiB of them is damage."""

_HEADER = struct.Struct("<8sIIQQQQQQQQQQIIiII4x")
_ENTRY = struct.Struct("<QBBBB4x16s")
_BLOCK = struct.Struct("<QIIQ8sBB2xI")
_LOADED = {1 + number: name for name, number in REGISTER_NUMBERS.items()}
"""Registers as journal entries name them; 0 is none, as in arenas of releases that knew none."""
_HAS_RSEQ = 1
"""In the header's flags: blocks use the program's restartable sequences."""


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
        row_shift: Binary logarithm of the bytes of a counter row.
        n_cpus: CPUs that have a row.
        rseq: Where blocks find a thread's ``struct rseq``; None where they use none.
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
    row_shift: int
    n_cpus: int
    rseq: RseqAbi | None = None
    n_blocks: int = 0
    version: int = VERSION

    CONTROLLER_START_OFF = 8 + 8 + 6 * 8
    N_ENTRIES_OFF = 8 + 8 + 8 * 8
    N_BLOCKS_OFF = 8 + 8 + 9 * 8

    def rows_at(self, start: Addr) -> CounterRows:
        """Return the counter rows of the arena that is mapped at ``start``."""
        return CounterRows(
            shared_addr=Addr(start + self.counter_off),
            row_shift=self.row_shift,
            n_cpus=self.n_cpus,
            rseq=self.rseq,
        )

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
            self.row_shift,
            self.n_cpus,
            self.rseq.offset if self.rseq is not None else 0,
            self.rseq.signature if self.rseq is not None else 0,
            _HAS_RSEQ if self.rseq is not None else 0,
        )

    @classmethod
    def unpack(cls, data: bytes) -> ArenaHeader | None:
        """Return the header in ``data``, or None if it is none of this version.

        A header whose parts do not lie in order, whose journal would not end before the
        code, or whose counters are not whole rows, is damaged and is none either.
        """
        if len(data) < _HEADER.size:
            return None
        magic, version, header_size, *numbers = _HEADER.unpack_from(data)
        if magic != MAGIC or version != VERSION or header_size != HEADER_SIZE:
            return None
        size, block_off, code_off, literal_off, counter_off, *others = numbers
        pid, start, target, n_entries, n_blocks, *counting = others
        row_shift, n_cpus, rseq_offset, signature, flags = counting
        if not HEADER_SIZE <= block_off <= code_off <= literal_off <= counter_off <= size:
            return None
        if n_entries > (block_off - HEADER_SIZE) // ENTRY_SIZE:
            return None
        if n_blocks > (code_off - block_off) // BLOCK_ENTRY_SIZE:
            return None
        if not MIN_ROW_SHIFT <= row_shift <= MAX_ROW_SHIFT:
            return None
        if size - counter_off != 1 + n_cpus << row_shift:
            return None
        has_rseq = bool(flags & _HAS_RSEQ)
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
            row_shift=row_shift,
            n_cpus=n_cpus,
            rseq=RseqAbi(offset=rseq_offset, signature=signature) if has_rseq else None,
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class JournalEntry:
    """One site that is changed: where it is and what was there before.

    A change writes the 32-bit displacement of a direct branch. Where one of the two forms is no
    such branch (a nop, an indirect call), it writes the opcode as well: ``opcode_size`` bytes
    more, right before it, prefixes among them where the other form has a longer opcode. Both
    forms have the same length, and the prefixes before that stay.

    Attributes:
        addr: First byte of the instruction.
        code: Its baseline bytes, at most 16.
        disp_off: Offset of the 32-bit displacement in them.
        opcode_size: Bytes before the displacement that a change writes too.
        loaded: Register that its blocks load its target into, where that is in memory; else None.
            Of no use for undoing: it tells what the blocks must be.
    """

    addr: Addr
    code: bytes
    disp_off: int
    opcode_size: int = 0
    loaded: str | None = None

    @classmethod
    def of(cls, site: Site) -> JournalEntry:
        """Return the entry of a site."""
        plain = decode_plain_branch(site.code) if site.is_plain else None
        return cls(
            addr=site.addr,
            code=site.code,
            disp_off=site.disp_addr - site.addr,
            opcode_size=0 if plain is None else plain.opcode_size,
            loaded=None if site.load is None else site.thunk.operand,
        )

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

    @property
    def changed_addr(self) -> Addr:
        """Address of the bytes that a change writes."""
        return Addr(self.disp_addr - self.opcode_size)

    @property
    def changed_size(self) -> int:
        """How many bytes a change writes."""
        return self.opcode_size + 4

    @property
    def original(self) -> bytes:
        """The bytes of the baseline that a change writes over."""
        return self.changed_of(self.code)

    def changed_of(self, code: bytes) -> bytes:
        """Return the bytes that a change writes of an instruction found at the site."""
        return code[self.disp_off - self.opcode_size : self.disp_off + 4]

    def with_changed(self, changed: bytes) -> bytes:
        """Return the whole instruction with other bytes where a change writes."""
        start = self.disp_off - self.opcode_size
        return self.code[:start] + changed + self.code[start + len(changed) :]

    def pack(self) -> bytes:
        """Return the entry's bytes."""
        code = self.code.ljust(16, b"\0")
        loaded = 0 if self.loaded is None else 1 + REGISTER_NUMBERS[self.loaded]
        return _ENTRY.pack(self.addr, len(self.code), self.disp_off, self.opcode_size, loaded, code)

    @classmethod
    def unpack(cls, data: bytes) -> JournalEntry:
        """Return the entry in ``data`` (``ENTRY_SIZE`` bytes)."""
        addr, size, disp_off, opcode_size, loaded, code = _ENTRY.unpack(data)
        return cls(
            addr=Addr(addr),
            code=code[:size],
            disp_off=disp_off,
            opcode_size=opcode_size,
            loaded=_LOADED.get(loaded),
        )


class BlockKind(IntEnum):
    """What a block is for."""

    COUNTING = 1
    """Counts each target of its site: a learning window, or a sample of one."""
    PROMOTED = 2
    """The fast path: counts misses only."""
    THUNK = 3
    """The indirect jump at which the other blocks of a plain site end; before it the load of its
    target, where that is in memory. It is never redirected, and stays as long as the arena."""


class BlockState(IntEnum):
    """Where a block is in its life."""

    FREE = 0
    """The entry says nothing. Memory of no live or retired block is ``int3``, or was never
    written and is zero."""
    LIVE = 1
    RETIRED = 2
    """Nothing leads to it any more; a thread may still be inside."""
    REWRITTEN = 3
    """It is led to, and its head leads on to another block of the site. Behind the head nobody
    is: those bytes are being replaced, and with them what the entry says of them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockEntry:
    """One block: where it is, and what its bytes must be.

    Attributes:
        addr: First byte.
        size: Bytes, its text and behind that its rseq descriptors.
        text_size: Bytes of instructions, at its begin; what follows is never executed.
        crc: CRC-32 (zlib) of all its bytes as encoded.
        site_addr: The site it was made for.
        head: Its first 8 bytes as encoded; in memory they may be a redirection.
        kind: What it is for.
        state: Where it is in its life.
    """

    addr: Addr
    size: int
    text_size: int
    crc: int
    site_addr: Addr
    head: bytes
    kind: BlockKind
    state: BlockState

    SIZE_OFF = 8
    HEAD_OFF = 24
    STATE_OFF = 32

    @property
    def end(self) -> Addr:
        """Address after the block."""
        return Addr(self.addr + self.size)

    @property
    def size_word(self) -> int:
        """The word of the entry that holds size and CRC."""
        return self.size | self.crc << 32

    @property
    def state_word(self) -> int:
        """The last word of the entry, stored at once to change the state."""
        return self.kind | self.state << 8 | self.text_size << 32

    def pack(self, state: BlockState | None = None) -> bytes:
        """Return the entry's bytes, in another state if one is given."""
        return _BLOCK.pack(
            self.addr,
            self.size,
            self.crc,
            self.site_addr,
            self.head,
            self.kind,
            self.state if state is None else state,
            self.text_size,
        )

    @classmethod
    def unpack(cls, data: bytes) -> BlockEntry | None:
        """Return the entry in ``data`` (``BLOCK_ENTRY_SIZE`` bytes); None if it is free."""
        addr, size, crc, site_addr, head, kind, state, text_size = _BLOCK.unpack(data)
        if state == BlockState.FREE or kind not in (1, 2, 3) or state not in (1, 2, 3):
            return None
        return cls(
            addr=Addr(addr),
            size=size,
            text_size=text_size,
            crc=crc,
            site_addr=Addr(site_addr),
            head=head,
            kind=BlockKind(kind),
            state=BlockState(state),
        )
