# SPDX-License-Identifier: Apache-2.0
"""The format of arenas, as a later controller reads it."""

from __future__ import annotations

import struct
from dataclasses import fields, replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.model import Addr, RseqAbi, Site, SiteKind, Thunk, ThunkFlavour
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    ENTRY_SIZE,
    HEADER_SIZE,
    MAGIC,
    VERSION,
    ArenaHeader,
    BlockEntry,
    BlockKind,
    BlockState,
    JournalEntry,
)
from optpoline.x86.assembler import REGISTER_NUMBERS
from optpoline.x86.plain_branches import decode_plain_branch

u64 = st.integers(0, (1 << 64) - 1)

HEADER = ArenaHeader(
    size=0x4C_0000 + 3 * 0x8_0000,
    block_off=0x2_0000,
    code_off=0x4_0000,
    literal_off=0x44_0000,
    counter_off=0x4C_0000,
    controller_pid=1234,
    controller_start=987_654_321,
    target_pid=4321,
    n_entries=17,
    row_shift=19,
    n_cpus=2,
    rseq=RseqAbi(offset=-0x9A0, signature=0x5305_3053),
    n_blocks=23,
)


@given(pid=u64, start=u64, target=u64, n_entries=st.integers(0, (0x2_0000 - 4096) // ENTRY_SIZE))
def test_header_round_trip(pid: int, start: int, target: int, n_entries: int) -> None:
    header = replace(
        HEADER, controller_pid=pid, controller_start=start, target_pid=target, n_entries=n_entries
    )
    assert ArenaHeader.unpack(header.pack()) == header
    assert ArenaHeader.unpack(header.pack().ljust(HEADER_SIZE, b"\xff")) == header


@pytest.mark.parametrize("rseq", [None, RseqAbi(offset=0x9A0, signature=0), HEADER.rseq])
@pytest.mark.parametrize(("row_shift", "n_cpus"), [(12, 0), (16, 1), (19, 256), (22, 8192)])
def test_rows_round_trip(rseq: RseqAbi | None, row_shift: int, n_cpus: int) -> None:
    size = HEADER.counter_off + (1 + n_cpus << row_shift)
    header = replace(HEADER, size=size, row_shift=row_shift, n_cpus=n_cpus, rseq=rseq)
    assert ArenaHeader.unpack(header.pack()) == header
    rows = header.rows_at(Addr(0x1000_0000))
    assert rows.rseq == rseq
    assert (rows.shared_addr, rows.n_cpus) == (0x1000_0000 + HEADER.counter_off, n_cpus)
    assert rows.shared_addr + rows.size == 0x1000_0000 + size


def test_header_fits_its_page_and_begins_with_its_magic() -> None:
    data = HEADER.pack()
    assert len(data) <= HEADER_SIZE
    assert data[:8] == MAGIC == b"OPTPOLIN"


def test_n_entries_is_where_its_offset_says() -> None:
    data = bytearray(HEADER.pack())
    assert ArenaHeader.N_ENTRIES_OFF % 8 == 0
    assert struct.unpack_from("<Q", data, ArenaHeader.N_ENTRIES_OFF) == (17,)
    struct.pack_into("<Q", data, ArenaHeader.N_ENTRIES_OFF, 18)
    assert ArenaHeader.unpack(bytes(data)) == replace(HEADER, n_entries=18)


def test_n_blocks_and_controller_start_are_where_their_offsets_say() -> None:
    data = HEADER.pack()
    assert struct.unpack_from("<Q", data, ArenaHeader.N_BLOCKS_OFF) == (23,)
    assert struct.unpack_from("<Q", data, ArenaHeader.CONTROLLER_START_OFF) == (987_654_321,)
    assert ArenaHeader.N_BLOCKS_OFF % 8 == ArenaHeader.CONTROLLER_START_OFF % 8 == 0


def test_offsets_are_no_fields() -> None:
    names = {field.name for field in (*fields(ArenaHeader), *fields(BlockEntry))}
    assert not {name for name in names if name.isupper()}


@pytest.mark.parametrize("size", [0, 1, 8, 87, len(HEADER.pack()) - 1])
def test_short_data_is_no_header(size: int) -> None:
    assert ArenaHeader.unpack(HEADER.pack()[:size]) is None


@pytest.mark.parametrize("off", range(16))
def test_other_magic_version_or_header_size_is_no_header(off: int) -> None:
    data = bytearray(HEADER.pack())
    data[off] ^= 1
    assert ArenaHeader.unpack(bytes(data)) is None


@pytest.mark.parametrize("version", [1, VERSION - 1, VERSION + 1])
def test_other_version_is_no_header(version: int) -> None:
    assert ArenaHeader.unpack(replace(HEADER, version=version).pack()) is None


@pytest.mark.parametrize(
    "damaged",
    [
        replace(HEADER, size=0),
        replace(HEADER, size=0x4B_0000),
        replace(HEADER, block_off=0),
        replace(HEADER, block_off=HEADER_SIZE - 1),
        replace(HEADER, block_off=HEADER.code_off + 1),
        replace(HEADER, code_off=0),
        replace(HEADER, code_off=HEADER.literal_off + 1),
        replace(HEADER, literal_off=HEADER.counter_off + 1),
        replace(HEADER, counter_off=1 << 63),
        replace(HEADER, n_entries=(0x2_0000 - 4096) // ENTRY_SIZE + 1),
        replace(HEADER, n_entries=(1 << 64) - 1),
        replace(HEADER, n_blocks=0x2_0000 // BLOCK_ENTRY_SIZE + 1),
        replace(HEADER, n_blocks=(1 << 64) - 1),
        replace(HEADER, size=HEADER.size + 4096),
        replace(HEADER, n_cpus=3),
        replace(HEADER, n_cpus=(1 << 32) - 1),
        replace(HEADER, row_shift=18),
        replace(HEADER, row_shift=(1 << 32) - 1),
        replace(HEADER, size=HEADER.counter_off + 3 * 2048, row_shift=11),
    ],
)
def test_impossible_parts_are_no_header(damaged: ArenaHeader) -> None:
    assert ArenaHeader.unpack(damaged.pack()) is None


def test_empty_memory_is_no_header() -> None:
    assert ArenaHeader.unpack(bytes(HEADER_SIZE)) is None


@given(st.binary(max_size=200))
def test_any_bytes_are_a_header_or_none(data: bytes) -> None:
    assert ArenaHeader.unpack(data) is None


@given(
    addr=u64,
    code=st.binary(min_size=5, max_size=15),
    off=st.integers(1, 11),
    opcode_size=st.integers(0, 5),
    loaded=st.sampled_from((None, *REGISTER_NUMBERS)),
)
def test_entry_round_trip(
    addr: int, code: bytes, off: int, opcode_size: int, loaded: str | None
) -> None:
    entry = JournalEntry(
        addr=Addr(addr), code=code, disp_off=off, opcode_size=opcode_size, loaded=loaded
    )
    data = entry.pack()
    assert len(data) == ENTRY_SIZE
    assert JournalEntry.unpack(data) == entry


def test_entry_addresses() -> None:
    entry = JournalEntry(addr=Addr(0x1000), code=bytes.fromhex("2e e8 01 02 03 04"), disp_off=2)
    assert (entry.disp_addr, entry.end, entry.disp) == (0x1002, 0x1006, b"\1\2\3\4")


def test_entry_of_an_arena_from_before_opcodes_were_changed() -> None:
    data = struct.pack("<QBB6x16s", 0x1000, 5, 1, b"\xe8\1\2\3\4")
    entry = JournalEntry.unpack(data)
    assert (entry.opcode_size, entry.loaded) == (0, None)
    assert entry.changed_of(entry.code) == entry.disp == b"\1\2\3\4"


def test_entry_whose_opcode_changes() -> None:
    code = bytes.fromhex("2e 0f 1f 44 00 00")
    entry = JournalEntry(addr=Addr(0x1000), code=code, disp_off=2, opcode_size=1)
    assert (entry.changed_addr, entry.changed_size) == (0x1001, 5)
    assert entry.changed_of(code) == code[1:]
    assert entry.with_changed(b"\xe9\1\2\3\4") == b"\x2e\xe9\1\2\3\4"


def test_entry_of_a_plain_site() -> None:
    site = Site(
        addr=Addr(0x1000),
        code=bytes.fromhex("2e 2e 2e 2e ff d0"),
        kind=SiteKind.CALL,
        disp_addr=Addr(0x1002),
        thunk=Thunk(addr=Addr(0), operand="rax", flavour=ThunkFlavour.PLAIN, symbol="*%rax"),
        module="/bin/program",
        function=None,
        function_addr=None,
        is_plain=True,
    )
    entry = JournalEntry.of(site)
    assert (entry.changed_addr, entry.changed_size) == (0x1001, 5)
    assert entry.original == site.code[1:]
    assert entry.with_changed(entry.original) == site.code
    retpoline = replace(site, code=bytes.fromhex("2e e8 01 02 03 04"), is_plain=False)
    assert JournalEntry.of(retpoline).original == b"\1\2\3\4"


def test_entries_lie_in_words() -> None:
    # n_entries counts what was written before it: entries must not share words.
    assert ENTRY_SIZE % 8 == 0
    assert HEADER_SIZE % ENTRY_SIZE == 0


# --- block table

block_entries = st.builds(
    BlockEntry,
    addr=u64.map(Addr),
    size=st.integers(0, (1 << 32) - 1),
    text_size=st.integers(0, (1 << 32) - 1),
    crc=st.integers(0, (1 << 32) - 1),
    site_addr=u64.map(Addr),
    head=st.binary(min_size=8, max_size=8),
    kind=st.sampled_from(BlockKind),
    state=st.sampled_from([BlockState.LIVE, BlockState.RETIRED]),
)


@given(entry=block_entries)
def test_block_entry_round_trip(entry: BlockEntry) -> None:
    data = entry.pack()
    assert len(data) == BLOCK_ENTRY_SIZE
    assert BlockEntry.unpack(data) == entry
    assert entry.end == entry.addr + entry.size


@given(entry=block_entries)
def test_state_word_is_the_last_word_of_an_entry(entry: BlockEntry) -> None:
    data = entry.pack()
    (word,) = struct.unpack_from("<Q", data, BlockEntry.STATE_OFF)
    assert word == entry.state_word
    assert BlockEntry.STATE_OFF + 8 == BLOCK_ENTRY_SIZE


@given(entry=block_entries)
def test_free_block_entry_says_nothing(entry: BlockEntry) -> None:
    assert BlockEntry.unpack(replace(entry, state=BlockState.FREE).pack()) is None


def test_block_table_begins_empty() -> None:
    assert BlockEntry.unpack(bytes(BLOCK_ENTRY_SIZE)) is None


@given(entry=block_entries, kind=st.integers(0, 255), state=st.integers(0, 255))
def test_any_kind_and_state_are_an_entry_or_none(entry: BlockEntry, kind: int, state: int) -> None:
    data = bytearray(entry.pack())
    data[BlockEntry.STATE_OFF : BlockEntry.STATE_OFF + 2] = kind, state
    found = BlockEntry.unpack(bytes(data))
    if kind in tuple(BlockKind) and state in (BlockState.LIVE, BlockState.RETIRED):
        assert found == replace(entry, kind=BlockKind(kind), state=BlockState(state))
    else:
        assert found is None


def test_block_entries_lie_in_words() -> None:
    # Their state is stored in one aligned word.
    assert BLOCK_ENTRY_SIZE % 8 == BlockEntry.STATE_OFF % 8 == 0


def test_entry_of_a_plain_site_whose_target_is_in_memory() -> None:
    code = bytes.fromhex("2e 42 ff 24 ed 10 00 00 00")
    operand = decode_plain_branch(code)
    assert operand is not None
    _, load = operand.find_operand("r11", Addr(0x1009)) or ("", None)
    site = Site(
        addr=Addr(0x1000),
        code=code,
        kind=SiteKind.JUMP,
        disp_addr=Addr(0x1005),
        thunk=Thunk(addr=Addr(0), operand="r11", flavour=ThunkFlavour.PLAIN, symbol="*16(,%r13,8)"),
        module="/bin/program",
        function=None,
        function_addr=None,
        is_plain=True,
        load=load,
    )
    entry = JournalEntry.of(site)
    assert (entry.changed_addr, entry.changed_size, entry.loaded) == (0x1001, 8, "r11")
    assert entry.with_changed(bytes.fromhex("2e 2e 2e e9 01 02 03 04"))[:1] == code[:1]
    assert JournalEntry.unpack(entry.pack()) == entry
