# SPDX-License-Identifier: Apache-2.0
"""Contexts that no stack leads to, and what a hit says of the program by where it is."""

from __future__ import annotations

import pytest

from optpoline.patch import memory_search
from optpoline.patch.memory_search import Found, cut_out, search_memory
from optpoline.patch.quiescence import ScannedStack, ThreadScan
from optpoline.patch.stacks import writable_ranges
from tests.unit.patch.fake_memory import END, INSIDE, PAGE, RANGES, START, TEXT_PC, FakeMemory

HEAP = 0x5555_0000_0000
STACK = 0x7FFC_0000_0000
SP = STACK + 4 * PAGE
FIRST, STACK_END = SP - 128, STACK + 16 * PAGE
OTHER = INSIDE + 8


@pytest.fixture
def memory() -> FakeMemory:
    """Return memory with a heap, a thread's stack, and code."""
    memory = FakeMemory()
    memory.map(HEAP, 8 * PAGE)
    memory.map(STACK, 16 * PAGE)
    memory.map(START, 4 * PAGE, "r-xp")
    return memory


def look_at(*held: int) -> ThreadScan:
    """Return a look at the thread whose stack that is."""
    return ThreadScan(frozenset(held), (ScannedStack(STACK, FIRST, STACK_END),))


def search(
    memory: FakeMemory,
    *scans: ThreadScan,
    dead: tuple[tuple[int, int], ...] = (),
    max_size: int = 1 << 30,
    is_stopped: bool = False,
) -> Found | None:
    """Search all writable memory."""
    return search_memory(
        read=memory.read,
        memory=writable_ranges(memory.maps),
        scans=scans,
        dead=dead,
        ranges=RANGES,
        max_size=max_size,
        is_stopped=is_stopped,
    )


def found(*addrs: int, proof: bool = False, suspicious: bool = False) -> Found:
    """Return what a search finds."""
    return Found(addrs=frozenset(addrs), is_proof=proof, is_suspicious=suspicious)


def test_context_in_the_heap(memory: FakeMemory) -> None:
    assert search(memory) == found()
    memory.put_frame(HEAP + 0x1008, sp=SP, pc=INSIDE)
    assert search(memory) == found(INSIDE, proof=True)
    memory.put_frame(HEAP + 0x2000, sp=SP, pc=END - 1)
    memory.put_frame(HEAP + 0x2100, sp=SP, pc=END)
    memory.put_frame(HEAP + 0x2200, sp=SP, pc=START - 1)
    assert search(memory) == found(INSIDE, END - 1, proof=True)


@pytest.mark.parametrize("off", [0x100, 0x108, PAGE - 8])
def test_bare_word_may_be_a_saved_pc(memory: FakeMemory, off: int) -> None:
    memory.put(HEAP + 0x80, START - 1, 5, END, 0x33, 0)
    assert search(memory) == found()
    memory.put(HEAP + off, INSIDE)
    assert search(memory) == found(INSIDE, proof=True)


def test_memory_that_is_not_asked_for_is_not_searched(memory: FakeMemory) -> None:
    memory.put_frame(START + 0x100, sp=SP, pc=INSIDE)
    assert search(memory) == found()


def test_more_memory_than_may_be_searched(memory: FakeMemory) -> None:
    memory.put(STACK + 0x100, INSIDE)
    assert search(memory, max_size=24 * PAGE) == found(INSIDE, proof=True)
    assert search(memory, max_size=24 * PAGE - 1) is None


@pytest.mark.parametrize("pc_off", [-24, -16, -8, 0, 8])
def test_context_across_two_reads(
    memory: FakeMemory, monkeypatch: pytest.MonkeyPatch, pc_off: int
) -> None:
    monkeypatch.setattr(memory_search, "_CHUNK_SIZE", 2 * PAGE)
    memory.put_frame(HEAP + 2 * PAGE + pc_off - 8, sp=SP, pc=INSIDE)
    assert search(memory) == found(INSIDE, proof=True)


def test_page_that_cannot_be_read_hides_only_itself(memory: FakeMemory) -> None:
    memory.holes.add(HEAP + 3 * PAGE)
    memory.put_frame(HEAP + 5 * PAGE, sp=SP, pc=INSIDE)
    memory.put_frame(HEAP + PAGE, sp=SP, pc=OTHER)
    assert search(memory) == found(INSIDE, OTHER, proof=True)


# --- stacks


def test_frame_below_the_stack_pointer_is_suspicious(memory: FakeMemory) -> None:
    # main() waits there while a coroutine runs in an array of its own.
    memory.put_frame(FIRST - 0x400, sp=FIRST, pc=INSIDE)
    memory.put(HEAP + 0x400, FIRST - 0x800)  # where its stack pointer was saved
    assert search(memory, look_at()) == found(INSIDE, suspicious=True)
    assert search(memory, look_at(), is_stopped=True) == found(INSIDE, suspicious=True)


@pytest.mark.parametrize("saved_at", [HEAP + 0x400, SP + 0x400, FIRST])
@pytest.mark.parametrize("is_stopped", [False, True])
def test_stack_pointer_may_be_saved_anywhere_that_is_not_below(
    memory: FakeMemory, saved_at: int, is_stopped: bool
) -> None:
    memory.put(FIRST - 0x400, INSIDE)
    memory.put(saved_at, FIRST - 0x408)
    assert search(memory, look_at(), is_stopped=is_stopped) == found(INSIDE, suspicious=True)


def test_what_a_signal_left_is_nothing_if_nobody_can_come_back_to_it(memory: FakeMemory) -> None:
    memory.put_frame(FIRST - 0x2000, sp=FIRST, pc=INSIDE)
    # Its own handler's frames are as dead; what points elsewhere is no way back.
    memory.put(FIRST - 0x2800, FIRST - 0x2400)
    memory.put(HEAP + 0x400, FIRST + 8, FIRST - 0x1000)
    assert search(memory, look_at()) == found()
    assert search(memory, look_at(), is_stopped=True) == found()


def test_what_the_thread_was_seen_to_hold_is_no_news(memory: FakeMemory) -> None:
    memory.put_frame(SP + 0x400, sp=SP + 0x800, pc=INSIDE)
    assert search(memory, look_at(INSIDE)) == found(INSIDE)


@pytest.mark.parametrize("held", [(), (OTHER,)])
def test_what_has_come_to_a_stack_since_is_proof(memory: FakeMemory, held: tuple[int, ...]) -> None:
    memory.put_frame(SP + 0x400, sp=SP + 0x800, pc=INSIDE)
    assert search(memory, look_at(*held)) == found(INSIDE, proof=True)


@pytest.mark.parametrize(
    ("at", "expected"),
    [
        (FIRST - 8, found(INSIDE, suspicious=True)),
        (FIRST, found(INSIDE, proof=True)),
        (STACK_END - 8, found(INSIDE, proof=True)),
        (STACK, found(INSIDE, suspicious=True)),
    ],
)
def test_bounds_of_what_was_scanned(memory: FakeMemory, at: int, expected: Found) -> None:
    memory.put(at, INSIDE)
    memory.put(HEAP, at - 8)
    assert search(memory, look_at()) == expected
    is_below = at < FIRST
    assert search(memory, look_at(), is_stopped=True) == (expected if is_below else found())


def test_in_a_stop_what_was_scanned_counts_for_no_limit(memory: FakeMemory) -> None:
    size = 8 * PAGE + 4 * PAGE - 128
    assert search(memory, look_at(), max_size=size, is_stopped=True) == found()
    assert search(memory, look_at(), max_size=size - 1, is_stopped=True) is None
    assert search(memory, look_at(), max_size=size) is None


def test_two_threads_in_one_mapping(memory: FakeMemory) -> None:
    # One runs deep on the stack, another one in an array further up.
    upper = ThreadScan(frozenset([OTHER]), (ScannedStack(STACK, FIRST + PAGE, STACK_END),))
    memory.put(FIRST + 2 * PAGE, OTHER)
    assert search(memory, look_at(), upper) == found(OTHER)
    memory.put(FIRST + 8, INSIDE)
    assert search(memory, look_at(INSIDE), upper) == found(OTHER, INSIDE)
    # Between the two it is the first one's stack, not below the second one's pointer.
    assert search(memory, look_at(), upper) == found(OTHER, INSIDE, proof=True)


def test_stack_of_a_thread_that_is_gone_is_suspicious(memory: FakeMemory) -> None:
    memory.put(STACK_END - 8, INSIDE)
    memory.put(HEAP, STACK_END - 16)
    assert search(memory, dead=((STACK, STACK_END),)) == found(INSIDE, suspicious=True)


@pytest.mark.parametrize(
    ("others", "parts"),
    [
        ([], [(10, 20)]),
        ([(0, 10), (20, 30)], [(10, 20)]),
        ([(0, 11), (19, 30)], [(11, 19)]),
        ([(10, 20)], []),
        ([(0, 5), (12, 14), (16, 17), (25, 26)], [(10, 12), (14, 16), (17, 20)]),
        ([(5, 40)], []),
    ],
)
def test_cut_out(others: list[tuple[int, int]], parts: list[tuple[int, int]]) -> None:
    assert cut_out((10, 20), others) == parts


def test_nothing_is_read_twice(memory: FakeMemory) -> None:
    memory.put(SP, TEXT_PC)
    search(memory, look_at())
    assert memory.reads == [(HEAP, 8 * PAGE), (STACK, 16 * PAGE)]
