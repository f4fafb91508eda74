# SPDX-License-Identifier: Apache-2.0
"""The poke protocol on text that nobody executes."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from optpoline.errors import SiteChanged, TargetFault
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import (
    Poke,
    crosses_line,
    direct_opcodes,
    find_entered,
    is_same_but_disp,
    leads_into,
    needs_all_stopped,
    poke_all,
    poke_batch,
    read_entries,
)

PAGE = 4096
BASE = 0x40_0000
OLD, NEW = b"\x11\x22\x33\x44", b"\x55\x66\x77\x08"


class FakeText:
    """Pages of text, some of them mapped.

    Args:
        n_pages: Pages from ``BASE`` on.
    """

    def __init__(self, n_pages: int = 8) -> None:
        """Map all pages, filled with nop."""
        self.data = bytearray(b"\x90" * PAGE * n_pages)
        self.mapped = set(range(n_pages))
        self.reads: list[tuple[int, int]] = []
        self.writes: list[tuple[int, bytes]] = []
        self.sticky: set[int] = set()

    def _check(self, addr: int, size: int) -> int:
        """Return an offset, or fault."""
        off = addr - BASE
        for page in range(off // PAGE, (off + size - 1) // PAGE + 1):
            if page not in self.mapped:
                raise TargetFault(addr, size)
        return off

    def read(self, addr: int, size: int) -> bytes:
        """Read bytes."""
        self.reads.append((addr, size))
        off = self._check(addr, size)
        return bytes(self.data[off : off + size])

    def write(self, addr: int, data: bytes) -> None:
        """Write bytes with one call; a sticky address keeps what it has."""
        self.writes.append((addr, data))
        off = self._check(addr, len(data))
        if addr not in self.sticky:
            self.data[off : off + len(data)] = data

    def place(self, off: int, code: bytes = b"\xe8" + OLD, disp_off: int = 1) -> JournalEntry:
        """Put a site's instruction somewhere and return its journal entry."""
        self.data[off : off + len(code)] = code
        return JournalEntry(addr=Addr(BASE + off), code=code, disp_off=disp_off)


def poke(entry: JournalEntry, new: bytes = NEW, expected: bytes | None = None) -> Poke:
    """Return a poke from the baseline to something else."""
    return Poke(entry=entry, expected=entry.disp if expected is None else expected, new=new)


def test_only_the_displacement_is_written_with_one_call() -> None:
    text = FakeText()
    before = bytes(text.data)
    entries = [
        text.place(0x10),
        text.place(0x41, b"\x2e\xe8" + OLD, 2),
        text.place(0x80, b"\x0f\x84" + OLD, 2),
        text.place(0xC0, b"\x2e\x2e\xe9" + OLD, 3),
    ]
    placed = bytes(text.data)
    result = poke_batch(text, [poke(entry) for entry in entries])
    assert [p.entry for p in result.done] == entries
    assert result.foreign == ()
    assert text.writes == [(entry.disp_addr, NEW) for entry in entries]
    changed = {i for i, (a, b) in enumerate(zip(placed, text.data, strict=True)) if a != b}
    assert changed == {entry.disp_addr - BASE + i for entry in entries for i in range(4)}
    assert len(before) == len(text.data)


def test_poke_and_poke_back_restores_every_byte() -> None:
    text = FakeText()
    entries = [text.place(0x40 * i + 3) for i in range(1, 30)]
    baseline = bytes(text.data)
    poke_batch(text, [poke(entry) for entry in entries])
    assert bytes(text.data) != baseline
    poke_batch(text, [poke(entry, new=entry.disp, expected=NEW) for entry in entries])
    assert bytes(text.data) == baseline


def test_same_bytes_already_there_is_success_without_a_write() -> None:
    text = FakeText()
    entry = text.place(0x20, b"\xe8" + OLD)
    text.data[0x21:0x25] = NEW
    result = poke_batch(text, [poke(entry)])
    assert len(result.done) == 1
    assert text.writes == []


@pytest.mark.parametrize("at", range(5))
def test_foreign_bytes_are_left(at: int) -> None:
    text = FakeText()
    site, neighbour = text.place(0x20), text.place(0x30)
    text.data[0x20 + at] = 0xCC  # a breakpoint, or the middle of another's jump
    before = bytes(text.data)
    result = poke_batch(text, [poke(site), poke(neighbour)])
    assert [p.entry for p in result.foreign] == [site]
    assert [p.entry for p in result.done] == [neighbour]
    assert text.data[0x20:0x25] == before[0x20:0x25]


def test_breakpoint_set_after_the_poke_is_left_at_the_restore() -> None:
    text = FakeText()
    entry = text.place(0x20)
    poke_batch(text, [poke(entry)])
    text.data[0x20] = 0xCC
    result = poke_batch(text, [poke(entry, new=entry.disp, expected=NEW)])
    assert len(result.foreign) == 1
    assert text.data[0x20:0x25] == b"\xcc" + NEW


def test_baseline_where_our_branch_should_be_is_a_reloaded_module() -> None:
    text = FakeText()
    entry = text.place(0x20)
    result = poke_batch(text, [poke(entry, expected=b"\1\2\3\4")])
    assert len(result.reloaded) == 1
    assert result.foreign == result.done == ()
    assert text.writes == []


def test_unexpected_displacement_of_our_own_is_foreign_too() -> None:
    text = FakeText()
    entry = text.place(0x20)
    poke_batch(text, [poke(entry)])
    n_writes = len(text.writes)
    result = poke_batch(text, [poke(entry, new=b"\5\6\7\0", expected=b"\1\2\3\4")])
    assert len(result.foreign) == 1
    assert len(text.writes) == n_writes


def test_unmapped_module_is_left() -> None:
    text = FakeText()
    here, gone = text.place(0x20), text.place(5 * PAGE + 0x20)
    text.mapped -= {4, 5, 6}
    result = poke_batch(text, [poke(here), poke(gone)])
    assert [p.entry for p in result.done] == [here]
    assert [p.entry for p in result.foreign] == [gone]
    assert len(text.writes) == 1


def test_neighbour_of_an_unmapped_site_is_poked() -> None:
    # The end of one module and the start of the next, which is gone.
    text = FakeText()
    here, gone, beyond = text.place(PAGE - 0x20), text.place(PAGE + 0x20), text.place(2 * PAGE + 4)
    text.mapped.remove(1)
    result = poke_batch(text, [poke(gone), poke(here), poke(beyond)])
    assert {p.entry.addr for p in result.done} == {here.addr, beyond.addr}
    assert [p.entry for p in result.foreign] == [gone]


def test_site_that_does_not_read_back_is_an_error() -> None:
    text = FakeText()
    first, second = text.place(0x20), text.place(0x40)
    text.sticky.add(second.disp_addr)
    with pytest.raises(SiteChanged) as caught:
        poke_batch(text, [poke(first), poke(second)])
    assert caught.value.addr == second.addr
    assert caught.value.expected == b"\xe8" + NEW
    assert caught.value.found == b"\xe8" + OLD
    # Each of them is whole: new or old.
    assert text.data[0x20:0x25] == b"\xe8" + NEW
    assert text.data[0x40:0x45] == b"\xe8" + OLD


def test_nothing_to_do() -> None:
    text = FakeText()
    result = poke_batch(text, [])
    assert (result.done, result.foreign) == ((), ())
    assert (text.reads, text.writes) == ([], [])


def test_dense_sites_are_read_with_one_call_each_way() -> None:
    text = FakeText(64)
    entries = [text.place(0x80 * i + 1) for i in range(1900)]
    poke_batch(text, [poke(entry) for entry in reversed(entries)])
    assert len(text.reads) == 2
    assert len(text.writes) == 1900


def test_sites_far_apart_are_read_apart() -> None:
    text = FakeText(64)
    entries = [text.place(off) for off in (0, 100, 20 * PAGE, 20 * PAGE + 100, 60 * PAGE)]
    found = read_entries(text, entries)
    assert found == {entry.addr: entry.code for entry in entries}
    assert len(text.reads) == 3
    assert sum(size for _, size in text.reads) < PAGE


def test_unmapped_entry_has_no_bytes() -> None:
    text = FakeText()
    entry = text.place(0x20)
    text.mapped.clear()
    assert read_entries(text, [entry]) == {entry.addr: b""}


@settings(max_examples=60, deadline=None)
@given(
    slots=st.lists(st.integers(0, 8 * PAGE // 16 - 1), unique=True, max_size=60),
    foreign=st.sets(st.integers(0, 59)),
    unmapped=st.sets(st.integers(0, 7)),
)
def test_any_batch_changes_what_it_says_and_nothing_else(
    slots: list[int], foreign: set[int], unmapped: set[int]
) -> None:
    text = FakeText()
    entries = [text.place(16 * slot + slot % 11) for slot in slots]
    for i in foreign:
        if i < len(entries):
            text.data[entries[i].addr - BASE] = 0xCC
    text.mapped -= unmapped
    model = bytearray(text.data)
    result = poke_batch(text, [poke(entry) for entry in entries])
    for i, entry in enumerate(entries):
        off = entry.addr - BASE
        pages = {off // PAGE, (off + 4) // PAGE}
        if i not in foreign and not pages & unmapped:
            model[off + 1 : off + 5] = NEW
            assert any(p.entry is entry for p in result.done)
        else:
            assert any(p.entry is entry for p in result.foreign)
    assert text.data == model
    assert len(result.done) + len(result.foreign) == len(entries)
    # One call a site, whole, inside one page.
    assert all(len(data) == 4 for _, data in text.writes)
    assert all(addr // PAGE == (addr + 3) // PAGE for addr, _ in text.writes)


@pytest.mark.parametrize(
    ("disp_off_in_line", "crosses"), [(0, False), (60, False), (61, True), (63, True), (64, False)]
)
def test_crosses_line(disp_off_in_line: int, crosses: bool) -> None:
    entry = JournalEntry(
        addr=Addr(BASE + 64 + disp_off_in_line - 1), code=b"\xe8" + OLD, disp_off=1
    )
    assert crosses_line(entry) is crosses


# --- whole instructions

NOP = bytes.fromhex("0f1f440000")
JUMP = b"\xe9" + NEW


@pytest.mark.parametrize("n_prefixes", range(4))
def test_opcode_and_displacement_are_written_with_one_call(n_prefixes: int) -> None:
    text = FakeText()
    prefixes = b"\x2e" * n_prefixes
    text.data[0x40 - n_prefixes : 0x45] = prefixes + NOP
    entry = JournalEntry(
        addr=Addr(BASE + 0x40 - n_prefixes),
        code=prefixes + NOP,
        disp_off=n_prefixes + 1,
        opcode_size=1,
    )
    assert needs_all_stopped(entry)
    there = Poke(entry=entry, expected=NOP, new=JUMP)
    assert poke_batch(text, [there]).done == (there,)
    assert text.writes == [(BASE + 0x40, JUMP)]
    code = text.read(entry.addr, len(entry.code))
    assert code == prefixes + JUMP
    assert is_same_but_disp(entry, code)
    goal = entry.end + int.from_bytes(NEW, "little")
    assert leads_into(entry, code, goal, goal + 1)
    assert not leads_into(entry, entry.code, 0, 1 << 64)
    poke_all(text, [Poke(entry=entry, expected=JUMP, new=NOP)])
    assert text.read(entry.addr, len(entry.code)) == prefixes + NOP


def test_forms_of_a_plain_indirect_call() -> None:
    # Prefixed, so that a direct call has its length: what a compiler plugin would emit.
    code = bytes.fromhex("2e2e2effd0")
    entry = JournalEntry(addr=Addr(BASE), code=code, disp_off=1, opcode_size=1)
    assert is_same_but_disp(entry, code)
    assert is_same_but_disp(entry, b"\xe8" + NEW)
    assert not is_same_but_disp(entry, b"\xcc" + NEW)
    assert not is_same_but_disp(entry, b"\xe8" + NEW + b"\x90")
    # A jump in the place of a call, and the other way round, is somebody else's.
    jump = replace(entry, code=bytes.fromhex("2e2e2effe0"))
    assert is_same_but_disp(jump, b"\xe9" + NEW)
    assert not is_same_but_disp(entry, b"\xe9" + NEW)
    assert not is_same_but_disp(jump, b"\xe8" + NEW)
    assert (direct_opcodes(entry), direct_opcodes(jump)) == ((b"\xe8",), (b"\xe9",))


def test_forms_of_a_call_through_memory() -> None:
    code = bytes.fromhex("2e ff 15 00 01 00 00")
    entry = JournalEntry(addr=Addr(BASE), code=code, disp_off=3, opcode_size=2)
    direct = b"\x2e\x2e\xe8" + NEW
    assert direct_opcodes(entry) == (b"\x2e\xe8",)
    assert is_same_but_disp(entry, code)
    assert is_same_but_disp(entry, direct)
    assert not is_same_but_disp(entry, b"\x2e\xff\xe8" + NEW)
    assert not is_same_but_disp(entry, b"\xcc\x2e\xe8" + NEW)
    text = FakeText()
    text.data[: len(code)] = code
    there = Poke(entry=entry, expected=code[1:], new=direct[1:])
    assert poke_batch(text, [there]).done == (there,)
    assert text.writes == [(BASE + 1, direct[1:])]
    poke_all(text, [Poke(entry=entry, expected=direct[1:], new=entry.original)])
    assert text.read(BASE, len(code)) == code


def test_entered_is_behind_the_first_byte() -> None:
    entries = [
        JournalEntry(addr=Addr(BASE + off), code=NOP, disp_off=1, opcode_size=1)
        for off in (0, 5, 20)  # the first two without a gap
    ]
    found = {off: find_entered(entries, Addr(BASE + off)) for off in range(-1, 27)}
    entered = {off: entry.addr - BASE for off, entry in found.items() if entry is not None}
    first = dict.fromkeys((1, 2, 3, 4), 0)
    assert entered == first | dict.fromkeys((6, 7, 8, 9), 5) | dict.fromkeys((21, 22, 23, 24), 20)
    assert find_entered([], Addr(BASE)) is None


def test_all_are_written_in_their_order() -> None:
    text = FakeText()
    entries = [text.place(off) for off in (0x80, 0x20, 0x1020)]
    poke_all(text, [poke(entry) for entry in entries])
    assert [addr for addr, _ in text.writes] == [entry.disp_addr for entry in entries]


@pytest.mark.parametrize("odd", range(3))
def test_one_that_is_not_as_expected_keeps_all_from_being_written(odd: int) -> None:
    text = FakeText()
    entries = [text.place(off) for off in (0x20, 0x40, 0x1020)]
    text.data[entries[odd].addr - BASE] = 0xCC
    before = bytes(text.data)
    with pytest.raises(SiteChanged) as caught:
        poke_all(text, [poke(entry) for entry in entries])
    assert caught.value.addr == entries[odd].addr
    assert text.writes == []
    assert bytes(text.data) == before


@pytest.mark.parametrize("failing", range(3))
def test_a_write_that_fails_undoes_those_before(failing: int) -> None:
    text = FakeText()
    entries = [text.place(off) for off in (0x20, 0x40, 0x1020)]
    before = bytes(text.data)
    text.sticky.add(entries[failing].disp_addr)  # it does not read back
    with pytest.raises(SiteChanged):
        poke_all(text, [poke(entry) for entry in entries])
    assert len(text.writes) > 3
    assert bytes(text.data) == before
