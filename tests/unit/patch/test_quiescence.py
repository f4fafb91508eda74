# SPDX-License-Identifier: Apache-2.0
"""Who may come back into a block: synthetic stacks, frames and contexts."""

from __future__ import annotations

import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.model import Addr
from optpoline.patch.quiescence import ScannedStack, ThreadPosition, ThreadScan, scan_thread
from optpoline.patch.ranges import AddressRanges
from optpoline.patch.stacks import MAX_NEIGHBOUR_SCAN_SIZE, MAX_STACK_SCAN_SIZE, StackMap
from tests.unit.patch.fake_memory import (
    ALT_STACK,
    END,
    INSIDE,
    PAGE,
    RANGES,
    SEGMENTS,
    STACK,
    START,
    TEXT_PC,
    FakeMemory,
)


@pytest.fixture
def memory() -> FakeMemory:
    """Return memory with a stack and an alternate stack."""
    memory = FakeMemory()
    memory.map(STACK, 16 * PAGE)
    memory.map(ALT_STACK, 4 * PAGE)
    memory.map(START, 4 * PAGE, "r-xp")
    return memory


def scan(
    memory: FakeMemory, sp: int, pc: int = TEXT_PC, ranges: AddressRanges = RANGES
) -> ThreadScan | None:
    """Look at a thread at ``sp`` and ``pc``."""
    return scan_thread(
        ThreadPosition(tid=1, pc=Addr(pc), sp=Addr(sp)),
        read=memory.read,
        find_resident=memory.find_resident,
        stacks=StackMap(memory.maps),
        ranges=ranges,
    )


def is_quiescent(memory: FakeMemory, sp: int, pc: int = TEXT_PC) -> bool:
    """Tell whether a thread at ``sp`` and ``pc`` is quiescent."""
    found = scan(memory, sp, pc)
    return found is not None and not found.held


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


GUARDED = 0x7E00_0000_0000


def map_guarded(memory: FakeMemory, size: int) -> int:
    """Map a stack as pthreads do; return its end."""
    memory.map(GUARDED - PAGE, PAGE, "---p")
    memory.map(GUARDED, size)
    return GUARDED + size


def test_only_memory_that_exists_is_read(memory: FakeMemory) -> None:
    # To read a page makes it exist; and there may be a lot of them.
    end = map_guarded(memory, 32 << 20)
    memory.resident = [(GUARDED + PAGE, GUARDED + 3 * PAGE), (end - PAGE, end)]
    memory.put(end - 8, INSIDE)
    assert not is_quiescent(memory, GUARDED + 2 * PAGE)
    assert memory.reads == [
        (GUARDED + 2 * PAGE - 128, PAGE + 128),
        (end - PAGE, PAGE),
    ]


def test_neighbours_that_exist_are_read_as_one(memory: FakeMemory) -> None:
    # A frame may lie across two mappings.
    end = map_guarded(memory, 1 << 20)
    memory.map(end, PAGE)
    memory.resident = [(end - PAGE, end), (end, end + PAGE)]
    memory.put(SP + 8, INSIDE)
    memory.put_frame(end - 16, sp=SP, pc=TEXT_PC)
    assert not is_quiescent(memory, GUARDED + PAGE)


def test_large_allocation_above_a_stack_does_not_hide_it(memory: FakeMemory) -> None:
    end = map_guarded(memory, 8 << 20)
    memory.map_nothing(end, 200 << 20)
    memory.resident = [(end - PAGE, end + (200 << 20))]
    sp = end - PAGE // 2
    assert is_quiescent(memory, sp)
    assert memory.reads == [(sp - 128, MAX_NEIGHBOUR_SCAN_SIZE)]
    found = scan(memory, sp)
    assert found is not None
    assert found.stacks == (ScannedStack(GUARDED, sp - 128, sp - 128 + MAX_NEIGHBOUR_SCAN_SIZE),)


def test_scan_of_a_deep_stack_leaves_the_rest_to_the_search(memory: FakeMemory) -> None:
    memory.map_nothing(GUARDED, MAX_STACK_SCAN_SIZE + PAGE, path="[stack]")
    memory.resident = []
    found = scan(memory, GUARDED + 256)
    first = GUARDED + 128
    assert found == ThreadScan(
        frozenset(), (ScannedStack(GUARDED, first, first + MAX_STACK_SCAN_SIZE),)
    )


def test_stack_that_a_thread_has_not_made_is_not_noted(memory: FakeMemory) -> None:
    found = scan(memory, SP)
    assert found is not None
    assert found.stacks == ()


def test_interrupted_stack_is_noted_as_well(memory: FakeMemory) -> None:
    end = map_guarded(memory, 4 * PAGE)
    memory.put_frame(ALT_STACK + 0x800, sp=GUARDED + PAGE, pc=TEXT_PC)
    found = scan(memory, ALT_STACK + 0x400)
    assert found is not None
    assert found.stacks == (ScannedStack(GUARDED, GUARDED + PAGE - 128, end),)


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


def test_gap_between_ranges_is_outside(memory: FakeMemory) -> None:
    """Blocks that are retired together do not lie side by side."""
    ranges = AddressRanges([(START, START + 16), (START + 64, START + 96)])
    memory.put(SP + 64, START + 16, START + 63, START + 96)

    def is_clear() -> bool:
        found = scan(memory, SP, START + 32, ranges)
        return found is not None and not found.held

    assert is_clear()
    memory.put(SP + 128, START + 64)
    assert not is_clear()
