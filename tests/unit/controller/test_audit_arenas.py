# SPDX-License-Identifier: Apache-2.0
"""What an audit says of an arena that no live test can break: rights, and what a kill leaves."""

from __future__ import annotations

import os
import zlib
from collections.abc import Sequence
from dataclasses import replace

import pytest

from optpoline.controller.audit_arenas import ArenaJudge, judge_rights, was_killed
from optpoline.controller.audit_report import Fault, FaultKind
from optpoline.controller.audit_scene import ArenaContents, BlockSlot, CodeMap, Finding
from optpoline.controller.left_arenas import LeftArena
from optpoline.errors import TargetFault
from optpoline.model import Addr, BlockPlan, Mapping, Miss, OperandLoad
from optpoline.patch.layout import (
    ARENA_PATH,
    ArenaHeader,
    BlockEntry,
    BlockKind,
    BlockState,
    JournalEntry,
)
from optpoline.process.procfs import read_start_time
from optpoline.x86.blocks import HEAD_SIZE, POISON, encode_block
from tests.emulate.block_kinds import LiteralTable

START = 0x2000_0000
NOBODY = 1 << 22
"""No process has this id."""
HEADER = ArenaHeader(
    size=0x8000,
    block_off=0x2000,
    code_off=0x3000,
    literal_off=0x4000,
    counter_off=0x5000,
    controller_pid=NOBODY,
    controller_start=7,
    target_pid=1,
    n_entries=1,
    row_shift=12,
    n_cpus=2,
    n_blocks=1,
)
THUNK = Addr(0x41_0000)
SITE = JournalEntry(
    addr=Addr(0x40_0000), code=b"\xe8" + (THUNK - 0x40_0005).to_bytes(4, "little"), disp_off=1
)


def mapping(first: int, last: int, perms: str, path: str = ARENA_PATH) -> Mapping:
    """Return a mapping of a part of the arena."""
    return Mapping(
        start=Addr(START + first), end=Addr(START + last), perms=perms, offset=first,
        device="00:01", inode=5, path=path,
    )  # fmt: skip


PARTS = (
    mapping(0, 0x3000, "r--s"),
    mapping(0x3000, 0x5000, "r-xs"),
    mapping(0x5000, 0x8000, "rw-s"),
)


def arena_of(*parts: Mapping) -> LeftArena:
    """Return an arena with these mappings."""
    return LeftArena(parts=parts, header=HEADER, history=(SITE,))


def kinds_of(findings: Sequence[Finding]) -> list[FaultKind]:
    """Return the kinds of the faults found."""
    return [one.what.kind for one in findings if isinstance(one.what, Fault)]


@pytest.mark.parametrize(
    ("number", "perms"),
    [(0, "rw-s"), (0, "r-xs"), (1, "rwxs"), (1, "rw-s"), (1, "r--s"), (2, "rwxs"), (2, "r--s")],
)
def test_rights(number: int, perms: str) -> None:
    assert list(judge_rights(arena_of(*PARTS), HEADER)) == []
    parts = [*PARTS]
    parts[number] = replace(parts[number], perms=perms)
    (finding,) = judge_rights(arena_of(*parts), HEADER)
    assert kinds_of([finding]) == [FaultKind.RIGHTS]
    assert perms in str(finding.what)


def test_parts_may_be_split_but_not_missing_or_joined() -> None:
    split = (mapping(0, 0x1000, "r--s"), mapping(0x1000, 0x3000, "r--s"), *PARTS[1:])
    assert list(judge_rights(arena_of(*split), HEADER)) == []
    assert kinds_of(list(judge_rights(arena_of(*PARTS[:2]), HEADER))) == [FaultKind.ARENA]
    joined = (mapping(0, 0x5000, "r-xs"), PARTS[2])
    assert kinds_of(list(judge_rights(arena_of(*joined), HEADER))) == [FaultKind.RIGHTS]


def test_who_was_killed() -> None:
    assert was_killed(HEADER)
    assert not was_killed(replace(HEADER, controller_start=0))
    own = replace(HEADER, controller_pid=os.getpid(), controller_start=read_start_time(os.getpid()))
    assert not was_killed(own)
    assert was_killed(replace(own, controller_start=1))  # the id is another process's by now


# --- what a kill leaves

BLOCK_ADDR = Addr(START + HEADER.code_off)
PLAN = BlockPlan(
    operand="rax",
    tree=Miss(),
    thunk_addr=THUNK,
    miss_count_addr=Addr(START + HEADER.counter_off),
)
CODE = encode_block(PLAN, BLOCK_ADDR, LiteralTable(Addr(START + HEADER.literal_off))).code


class FakeMemory:
    """An arena's memory."""

    def __init__(self, *parts: tuple[int, bytes]) -> None:
        """Keep (address, bytes)."""
        self._parts = parts

    def read(self, addr: int, size: int) -> bytes:
        """Read from the part that holds the whole range."""
        for start, data in self._parts:
            if start <= addr and addr + size <= start + len(data):
                return data[addr - start : addr - start + size]
        raise TargetFault(addr, size)


def judge(
    code: bytes, state: BlockState = BlockState.LIVE, header: ArenaHeader = HEADER
) -> tuple[list[FaultKind], list[str]]:
    """Judge an arena with one block; return the kinds of the faults, and the remarks."""
    return judge_blocks(code, header, (SITE,), _promoted_entry(state))


def _promoted_entry(state: BlockState) -> BlockEntry:
    """Return the entry of that block."""
    return BlockEntry(
        addr=BLOCK_ADDR,
        size=len(CODE),
        text_size=len(CODE),
        crc=zlib.crc32(CODE),
        site_addr=SITE.addr,
        head=CODE[:HEAD_SIZE],
        kind=BlockKind.PROMOTED,
        state=state,
    )


def judge_blocks(
    code: bytes, header: ArenaHeader, history: tuple[JournalEntry, ...], *entries: BlockEntry
) -> tuple[list[FaultKind], list[str]]:
    """Judge an arena with some blocks of one site, whose module may have been loaded anew."""
    start = START + header.block_off
    table = b"".join(entry.pack() for entry in entries)
    packed = [(start + len(one.pack()) * i, one.pack()) for i, one in enumerate(entries)]
    slots = tuple(
        BlockSlot(addr=Addr(addr), raw=raw, entry=BlockEntry.unpack(raw)) for addr, raw in packed
    )
    arena = replace(arena_of(*PARTS), history=history)
    contents = ArenaContents(arena=arena, header=header, before=slots, code=code, after=slots)
    memory = FakeMemory((START, header.pack()), (start, table), (BLOCK_ADDR, code))
    text = replace(mapping(0, 0, "r-xp", "/bin/x"), start=Addr(0x40_0000), end=Addr(0x42_0000))
    arena_judge = ArenaJudge(memory, CodeMap((text, *PARTS)), (contents,))
    return kinds_of(list(arena_judge.judge(contents))), arena_judge.remarks


LET_GO = replace(HEADER, controller_start=0)
CLEAN = CODE.ljust(64, bytes((POISON,))) + bytes(64)


def test_a_sound_block() -> None:
    for header in (HEADER, LET_GO):
        assert judge(CLEAN, header=header) == ([], [])
        assert judge(CLEAN, BlockState.RETIRED, header) == ([], [])
    assert judge(CLEAN, BlockState.FREE, LET_GO)[0] == [FaultKind.FREE_MEMORY]


# --- plain sites

PLAIN = JournalEntry(
    addr=SITE.addr, code=bytes.fromhex("2e 2e 2e ff d0"), disp_off=1, opcode_size=1
)
PLAIN_CODE = encode_block(
    replace(PLAN, thunk_addr=Addr(BLOCK_ADDR + 64)),
    BLOCK_ADDR,
    LiteralTable(Addr(START + HEADER.literal_off)),
).code


def judge_plain(
    site: JournalEntry, thunk: bytes, *before: JournalEntry, plain_code: bytes = PLAIN_CODE
) -> list[FaultKind]:
    """Judge a block and the thunk that it ends at; return the kinds of the faults."""
    block, own = (
        BlockEntry(
            addr=Addr(BLOCK_ADDR + off),
            size=len(code),
            text_size=len(code),
            crc=zlib.crc32(code),
            site_addr=site.addr,
            head=code.ljust(HEAD_SIZE, bytes((POISON,)))[:HEAD_SIZE],
            kind=kind,
            state=BlockState.LIVE,
        )
        for off, code, kind in ((0, plain_code, BlockKind.PROMOTED), (64, thunk, BlockKind.THUNK))
    )
    code = plain_code.ljust(64, bytes((POISON,))) + thunk.ljust(16, bytes((POISON,)))
    return judge_blocks(code, HEADER, (*before, site), block, own)[0]


def test_a_plain_site() -> None:
    assert judge_plain(PLAIN, bytes.fromhex("ff e0 cc")) == []


@pytest.mark.parametrize("thunk", ["ff e1 cc", "ff e0 90", "ff d0 cc", "ff 20 cc"])
def test_thunk_that_is_not_what_the_site_was(thunk: str) -> None:
    assert judge_plain(PLAIN, bytes.fromhex(thunk)) == [FaultKind.BLOCK]


def test_thunks_of_modules_that_were_loaded_at_one_place_in_turn() -> None:
    other = replace(PLAIN, code=bytes.fromhex("2e 2e 2e ff d1"))
    for thunk in ("ff e0 cc", "ff e1 cc"):
        assert judge_plain(PLAIN, bytes.fromhex(thunk), other) == []
    assert judge_plain(PLAIN, bytes.fromhex("ff e2 cc"), other) == [FaultKind.BLOCK]


def test_no_indirect_jump_for_a_site_that_has_a_thunk_of_the_program() -> None:
    # Its block does not end at the program's, either.
    assert judge_plain(SITE, bytes.fromhex("ff e0 cc")) == [FaultKind.BLOCK, FaultKind.BLOCK]


# --- plain sites whose target is in memory

LOADED = JournalEntry(
    addr=SITE.addr,
    code=bytes.fromhex("2e 2e ff 53 10"),
    disp_off=1,
    opcode_size=1,
    loaded="r11",
)
LOAD = bytes.fromhex("4c 8b 9b 10 00 00 00")
"""mov 0x10(%rbx), %r11."""
LOADED_CODE = encode_block(
    replace(PLAN, operand="r11", thunk_addr=Addr(BLOCK_ADDR + 64), load=OperandLoad(code=LOAD)),
    BLOCK_ADDR,
    LiteralTable(Addr(START + HEADER.literal_off)),
).code
LOADED_THUNK = LOAD + bytes.fromhex("41 ff e3 cc")


def judge_loaded(*before: JournalEntry, thunk: bytes = LOADED_THUNK) -> list[FaultKind]:
    return judge_plain(LOADED, thunk, *before, plain_code=LOADED_CODE)


def test_a_plain_site_through_memory() -> None:
    assert judge_loaded() == []
    assert judge_loaded(thunk=LOAD + bytes.fromhex("ff e0 cc")) == [FaultKind.BLOCK]
    assert judge_loaded(thunk=bytes.fromhex("41 ff e3 cc")) == [FaultKind.BLOCK]
    wrong = replace(LOADED, code=bytes.fromhex("2e 2e ff 53 18"))
    found = judge_plain(wrong, LOADED_THUNK, plain_code=LOADED_CODE)
    assert found == [FaultKind.BLOCK, FaultKind.BLOCK]
    # Without its load the block is none of the site's, though it is of one through a register.
    assert judge_plain(LOADED, LOADED_THUNK) == [FaultKind.BLOCK]


def test_modules_of_which_one_has_its_target_in_memory() -> None:
    assert judge_loaded(PLAIN) == []
    assert judge_loaded(replace(LOADED, code=bytes.fromhex("2e 2e ff 53 18"))) == []
    assert judge_loaded(PLAIN, thunk=bytes.fromhex("ff e1 cc")) == [FaultKind.BLOCK]


def test_plain_site_whose_baseline_is_none() -> None:
    other = replace(PLAIN, code=bytes.fromhex("2e 2e ff 53 10"))
    assert judge_plain(other, bytes.fromhex("ff e0 cc")) == [FaultKind.TABLE, FaultKind.TABLE]


def test_killed_while_a_block_was_written() -> None:
    dirty = CLEAN[:80] + b"\x48\x3d\x01"
    kinds, remarks = judge(dirty)
    assert kinds == []
    assert "while it wrote a block" in remarks[0]
    assert judge(dirty, header=LET_GO) == ([FaultKind.FREE_MEMORY], [])


def test_killed_while_a_block_was_freed() -> None:
    poisoned = bytes((POISON,)) * len(CLEAN)
    kinds, remarks = judge(poisoned, BlockState.RETIRED)
    assert kinds == []
    assert "being freed" in remarks[0]
    assert FaultKind.BLOCK in judge(poisoned, BlockState.RETIRED, LET_GO)[0]
    assert FaultKind.BLOCK in judge(poisoned, BlockState.LIVE)[0]
