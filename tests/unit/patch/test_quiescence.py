# SPDX-License-Identifier: Apache-2.0
"""Who may come back into a block: synthetic stacks, frames and contexts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.errors import TargetFault
from optpoline.model import Addr, Mapping
from optpoline.patch import quiescence
from optpoline.patch.quiescence import ThreadPosition, find_held, find_words
from optpoline.patch.ranges import AddressRanges
from optpoline.patch.stacks import MAX_STACK_SCAN_SIZE, StackMap

PAGE = 4096
START, END = Addr(0x7F00_1000_0000), Addr(0x7F00_1040_0000)
INSIDE = START + 0x123
RANGES = AddressRanges([(START, END)])
TEXT_PC = Addr(0x40_1000)
SEGMENTS = 0x002B_0000_0000_0033
STACK = 0x7FFC_0000_0000
ALT_STACK = 0x7F20_0000_0000


class FakeMemory:
    """Ranges of zeroed memory with words in them."""

    def __init__(self) -> None:
        """Start with nothing mapped."""
        self.parts: dict[int, bytearray] = {}
        self.perms: dict[int, str] = {}
        self.holes: set[int] = set()

    def map(self, start: int, size: int, perms: str = "rw-p") -> None:
        """Map zeroed memory."""
        self.parts[start] = bytearray(size)
        self.perms[start] = perms

    @property
    def maps(self) -> list[Mapping]:
        """All mappings in address order."""
        return [
            Mapping(
                start=Addr(start),
                end=Addr(start + len(self.parts[start])),
                perms=self.perms[start],
                offset=0,
                device="00:00",
                inode=0,
                path="",
            )
            for start in sorted(self.parts)
        ]

    def put(self, addr: int, *words: int) -> None:
        """Store words."""
        for i, word in enumerate(words):
            at = addr + 8 * i
            start = max(start for start in self.parts if start <= at)
            struct.pack_into("<Q", self.parts[start], at - start, word)

    def put_frame(self, addr: int, *, sp: int, pc: int, segments: int = SEGMENTS) -> None:
        """Store the end of a sigcontext: rsp, rip, eflags, segments."""
        self.put(addr, sp, pc, 0x246, segments)

    def read(self, addr: int, size: int) -> bytes:
        """Read across neighbouring mappings, or fault."""
        if any(addr < hole + PAGE and hole < addr + size for hole in self.holes):
            raise TargetFault(addr, size)
        data = b""
        while len(data) < size:
            at = addr + len(data)
            part = next((s for s, d in self.parts.items() if s <= at < s + len(d)), None)
            if part is None:
                raise TargetFault(addr, size)
            data += self.parts[part][at - part :][: size - len(data)]
        return bytes(data)


@pytest.fixture
def memory() -> FakeMemory:
    """Return memory with a stack and an alternate stack."""
    memory = FakeMemory()
    memory.map(STACK, 16 * PAGE)
    memory.map(ALT_STACK, 4 * PAGE)
    memory.map(START, 4 * PAGE, "r-xp")
    return memory


def is_quiescent(memory: FakeMemory, sp: int, pc: int = TEXT_PC) -> bool:
    """Tell whether a thread at ``sp`` and ``pc`` is quiescent."""
    held = find_held(
        ThreadPosition(tid=1, pc=Addr(pc), sp=Addr(sp)),
        read=memory.read,
        stacks=StackMap(memory.maps),
        ranges=RANGES,
    )
    return held == frozenset()


SP = STACK + 4 * PAGE


def test_thread_elsewhere_with_a_clean_stack(memory: FakeMemory) -> None:
    assert is_quiescent(memory, SP)


@pytest.mark.parametrize(
    ("pc", "expected"), [(START - 1, True), (START, False), (END - 1, False), (END, True)]
)
def test_pc_inside(memory: FakeMemory, pc: int, expected: bool) -> None:
    assert is_quiescent(memory, SP, pc) is expected


@pytest.mark.parametrize(
    ("word", "expected"), [(START - 1, True), (START, False), (END - 1, False), (END, True)]
)
def test_saved_pc_inside(memory: FakeMemory, word: int, expected: bool) -> None:
    memory.put_frame(SP + 0x400, sp=SP + 0x800, pc=word)
    assert is_quiescent(memory, SP) is expected


@pytest.mark.parametrize(
    ("off", "expected"), [(-136, True), (-128, False), (-8, False), (0, False), (8, False)]
)
def test_red_zone_counts_and_what_is_below_does_not(
    memory: FakeMemory, off: int, expected: bool
) -> None:
    memory.put(SP + off, INSIDE)
    assert is_quiescent(memory, SP) is expected


def test_last_word_of_the_stack(memory: FakeMemory) -> None:
    memory.put(STACK + 16 * PAGE - 8, INSIDE)
    assert not is_quiescent(memory, SP)


def test_stack_pointer_that_is_no_multiple_of_eight(memory: FakeMemory) -> None:
    memory.put(SP + 0x100, INSIDE)
    for off in range(8):
        assert not is_quiescent(memory, SP + off)


def test_stack_pointer_at_the_very_start_of_the_stack(memory: FakeMemory) -> None:
    assert is_quiescent(memory, STACK)
    memory.put(STACK, INSIDE)
    assert not is_quiescent(memory, STACK)


def test_any_word_counts_whatever_it_is(memory: FakeMemory) -> None:
    # Conservative: a plain number that happens to be such an address keeps the range.
    memory.put(SP + 0x40, 1, 2, INSIDE, 3)
    assert not is_quiescent(memory, SP)


def test_half_a_word_does_not(memory: FakeMemory) -> None:
    # Saved PCs are whole, aligned words.
    memory.put(SP + 0x40, (INSIDE << 32) & (1 << 64) - 1, INSIDE >> 32)
    assert is_quiescent(memory, SP)


# --- signal handlers on other stacks


def test_handler_on_an_alternate_stack_that_interrupted_a_block(memory: FakeMemory) -> None:
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=INSIDE)
    assert not is_quiescent(memory, ALT_STACK + 0x400)


def test_nested_handler_is_found_through_the_interrupted_stack(memory: FakeMemory) -> None:
    # On the main stack a handler interrupted the block; another one, on the
    # alternate stack, interrupted that handler.
    memory.put_frame(SP + 0x600, sp=SP + 0x900, pc=INSIDE)
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC)
    assert not is_quiescent(memory, ALT_STACK + 0x400)


def test_red_zone_of_the_interrupted_stack_is_scanned(memory: FakeMemory) -> None:
    memory.put(SP - 0x80, INSIDE)
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC)
    assert not is_quiescent(memory, ALT_STACK + 0x400)


def test_words_below_the_interrupted_stack_pointer_do_not_count(memory: FakeMemory) -> None:
    memory.put(SP - 0x88, INSIDE)
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC)
    assert is_quiescent(memory, ALT_STACK + 0x400)


def test_clean_frames_are_quiescent(memory: FakeMemory) -> None:
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC)
    assert is_quiescent(memory, ALT_STACK + 0x400)


@pytest.mark.parametrize("segments", [SEGMENTS, 0x002B_1234_5678_0033])
def test_any_fs_and_gs_make_a_frame(memory: FakeMemory, segments: int) -> None:
    memory.put(SP, INSIDE)
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC, segments=segments)
    assert not is_quiescent(memory, ALT_STACK + 0x400)


@pytest.mark.parametrize("segments", [0x0033, 0x002B_0000_0000_0023, 0x002B_0000_0000_0010])
def test_other_words_are_no_frame(memory: FakeMemory, segments: int) -> None:
    memory.put(SP, INSIDE)
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC, segments=segments)
    assert is_quiescent(memory, ALT_STACK + 0x400)


def test_frames_that_lead_round_in_a_circle(memory: FakeMemory) -> None:
    memory.put_frame(ALT_STACK + 0x800, sp=SP, pc=TEXT_PC)
    memory.put_frame(SP + 0x100, sp=ALT_STACK + 0x400, pc=TEXT_PC)
    assert is_quiescent(memory, ALT_STACK + 0x400)


def test_what_looks_like_a_frame_with_wild_stack_pointers(memory: FakeMemory) -> None:
    for i, sp in enumerate((0, 8, (1 << 64) - 8, TEXT_PC, START - 8)):
        memory.put_frame(SP + 0x100 * i, sp=sp, pc=TEXT_PC)
    assert is_quiescent(memory, SP)


def test_segments_word_too_close_to_the_start_of_what_was_read(memory: FakeMemory) -> None:
    memory.put(STACK, 1, 2, SEGMENTS)
    assert is_quiescent(memory, STACK)


def test_stack_in_several_mappings(memory: FakeMemory) -> None:
    # A part was locked into memory: the kernel shows two mappings side by side.
    memory.map(STACK + 16 * PAGE, PAGE, "rw-p")
    memory.put(STACK + 16 * PAGE + 8, INSIDE)
    assert not is_quiescent(memory, SP)


def test_guard_page_ends_a_stack(memory: FakeMemory) -> None:
    memory.map(STACK + 16 * PAGE, PAGE, "---p")
    memory.map(STACK + 17 * PAGE, PAGE)
    memory.put(STACK + 17 * PAGE + 8, INSIDE)
    assert is_quiescent(memory, SP)


def test_unreadable_stack_is_not_quiescent(memory: FakeMemory) -> None:
    memory.holes.add(STACK + 8 * PAGE)
    assert not is_quiescent(memory, SP)


def test_stack_too_deep_to_scan_is_not_quiescent() -> None:
    start = 0x7E00_0000_0000
    mapping = Mapping(
        start=Addr(start),
        end=Addr(start + MAX_STACK_SCAN_SIZE + PAGE),
        perms="rw-p",
        offset=0,
        device="00:00",
        inode=0,
        path="",
    )

    def refuse(addr: int, size: int) -> bytes:
        raise AssertionError("nothing is to be read")

    position = ThreadPosition(tid=1, pc=TEXT_PC, sp=Addr(start + 256))
    stacks = StackMap([mapping])
    assert find_held(position, read=refuse, stacks=stacks, ranges=RANGES) is None


@given(
    words=st.lists(st.integers(0, (1 << 64) - 1), max_size=200),
    at=st.none() | st.integers(0, 300),
)
def test_random_stacks_agree_with_a_plain_scan(words: list[int], at: int | None) -> None:
    memory = FakeMemory()
    memory.map(STACK, PAGE)
    plain = [word for word in words if word & 0xFFFF_0000_0000_FFFF != SEGMENTS]
    memory.put(STACK + 128, *plain)
    if at is not None:
        memory.put(STACK + 128 + 8 * at, INSIDE)
    (mapping,) = memory.maps
    stored = struct.unpack(f"<{PAGE // 8}Q", memory.read(mapping.start, PAGE))
    expected = not any(START <= word < END for word in stored)
    assert is_quiescent(memory, STACK + 128) is expected


# --- contexts that no stack leads to

HEAP = 0x5555_0000_0000


def find_contexts(
    memory: FakeMemory, skip: tuple[tuple[int, int], ...] = (), max_size: int = 1 << 30
) -> set[int] | None:
    """Search all memory for contexts with a PC in the range."""
    found = find_words(
        read=memory.read, maps=memory.maps, skip=skip, ranges=RANGES, max_size=max_size
    )
    return None if found is None else set(found)


def test_saved_context_in_the_heap(memory: FakeMemory) -> None:
    memory.map(HEAP, 4 * PAGE)
    assert find_contexts(memory) == set()
    memory.put_frame(HEAP + 0x1008, sp=SP, pc=INSIDE)
    assert find_contexts(memory) == {INSIDE}
    memory.put_frame(HEAP + 0x2000, sp=SP, pc=END - 1)
    memory.put_frame(HEAP + 0x2100, sp=SP, pc=END)
    memory.put_frame(HEAP + 0x2200, sp=SP, pc=START - 1)
    assert find_contexts(memory) == {INSIDE, END - 1}


@pytest.mark.parametrize("off", [0x100, 0x108, PAGE - 8])
def test_bare_word_may_be_a_saved_pc(memory: FakeMemory, off: int) -> None:
    memory.map(HEAP, PAGE)
    memory.put(HEAP + 0x80, START - 1, 5, END, 0x33, 0)
    assert find_contexts(memory) == set()
    memory.put(HEAP + off, INSIDE)
    assert find_contexts(memory) == {INSIDE}


def test_every_address_found_is_told_once(memory: FakeMemory) -> None:
    memory.map(HEAP, PAGE)
    memory.put(HEAP + 0x100, INSIDE, 5, INSIDE + 1, INSIDE)
    memory.put(ALT_STACK, END - 1)
    assert find_contexts(memory) == {INSIDE, INSIDE + 1, END - 1}


def test_memory_that_cannot_be_written_is_not_searched(memory: FakeMemory) -> None:
    memory.put_frame(START + 0x100, sp=SP, pc=INSIDE)
    assert find_contexts(memory) == set()


def test_skipped_ranges(memory: FakeMemory) -> None:
    memory.map(HEAP, PAGE)
    memory.map(HEAP + PAGE, PAGE)
    memory.put_frame(HEAP + 0x100, sp=SP, pc=INSIDE)
    memory.put_frame(HEAP + PAGE + 0x100, sp=SP, pc=INSIDE + 1)
    assert find_contexts(memory) == {INSIDE, INSIDE + 1}
    assert find_contexts(memory, skip=((HEAP, HEAP + PAGE),)) == {INSIDE + 1}
    assert find_contexts(memory, skip=((HEAP, HEAP + 2 * PAGE),)) == set()


def test_mapping_that_is_skipped_in_part_is_searched(memory: FakeMemory) -> None:
    # It grew since the stack in it was looked at: it is no longer one stack alone.
    memory.map(HEAP, 2 * PAGE)
    memory.put(HEAP + 0x100, INSIDE)
    assert find_contexts(memory, skip=((HEAP, HEAP + PAGE),)) == {INSIDE}


def test_more_memory_than_may_be_searched(memory: FakeMemory) -> None:
    memory.put_frame(ALT_STACK + 0x100, sp=SP, pc=INSIDE)
    assert find_contexts(memory, max_size=20 * PAGE) == {INSIDE}
    assert find_contexts(memory, max_size=20 * PAGE - 1) is None


@pytest.mark.parametrize("pc_off", [-24, -16, -8, 0, 8])
def test_context_across_two_reads(
    memory: FakeMemory, monkeypatch: pytest.MonkeyPatch, pc_off: int
) -> None:
    monkeypatch.setattr(quiescence, "_CHUNK_SIZE", 2 * PAGE)
    memory.map(HEAP, 4 * PAGE)
    memory.put_frame(HEAP + 2 * PAGE + pc_off - 8, sp=SP, pc=INSIDE)
    assert find_contexts(memory) == {INSIDE}


def test_context_across_two_mappings(memory: FakeMemory) -> None:
    memory.map(HEAP, PAGE)
    memory.map(HEAP + PAGE, PAGE)
    memory.put_frame(HEAP + PAGE - 16, sp=SP, pc=INSIDE)
    assert find_contexts(memory) == {INSIDE}


def test_page_that_cannot_be_read_hides_only_itself(memory: FakeMemory) -> None:
    memory.map(HEAP, 8 * PAGE)
    memory.holes.add(HEAP + 3 * PAGE)
    memory.put_frame(HEAP + 5 * PAGE, sp=SP, pc=INSIDE)
    memory.put_frame(HEAP + PAGE, sp=SP, pc=INSIDE + 1)
    assert find_contexts(memory) == {INSIDE, INSIDE + 1}


def test_gap_between_ranges_is_outside(memory: FakeMemory) -> None:
    """Blocks that are retired together do not lie side by side."""
    ranges = AddressRanges([(START, START + 16), (START + 64, START + 96)])
    memory.put(SP + 64, START + 16, START + 63, START + 96)

    def is_clear() -> bool:
        position = ThreadPosition(tid=1, pc=Addr(START + 32), sp=Addr(SP))
        stacks = StackMap(memory.maps)
        return not find_held(position, read=memory.read, stacks=stacks, ranges=ranges)

    assert is_clear()
    memory.put(SP + 128, START + 64)
    assert not is_clear()
