# SPDX-License-Identifier: Apache-2.0
"""What a sample of a thread tells of where it is, and when it does not tell."""

from __future__ import annotations

import struct
from collections.abc import Iterable

import pytest

from optpoline.controller.running_threads import scan_sample
from optpoline.model import Addr, Mapping
from optpoline.patch.quiescence import ThreadScan
from optpoline.patch.ranges import AddressRanges
from optpoline.patch.stacks import StackMap
from optpoline.process.perf_ring import StackSample
from optpoline.x86.signal_frame import FRAME_SEGMENTS, FRAME_SP_WORDS

START, END = 0x7000_0000, 0x7000_8000
SP = END - 0x100
CODE = AddressRanges([(0x5000, 0x6000)])
OUTSIDE = 0x4000


def mapping(start: int, end: int, path: str = "[stack]") -> Mapping:
    """Return a writable mapping."""
    return Mapping(
        start=Addr(start), end=Addr(end), perms="rw-p", offset=0,
        device="00:00", inode=0, path=path,
    )  # fmt: skip


def scan(
    words: Iterable[int] = (),
    *,
    pc: int = OUTSIDE,
    sp: int = SP,
    size: int | None = None,
    maps: tuple[Mapping, ...] = (mapping(START, END),),
    resident: tuple[tuple[int, int], ...] = (),
) -> ThreadScan | None:
    """Scan a sample with these words on top of the stack, 0 elsewhere."""
    stack = b"".join(struct.pack("<Q", word) for word in words)
    stack = stack.ljust(END - sp, b"\0")[:size]
    return scan_sample(
        StackSample(pc=pc, sp=sp, stack=stack),
        find_resident=lambda first, end: [r for r in resident if r[0] < end and first < r[1]],
        stacks=StackMap(maps),
        ranges=CODE,
    )


def test_outside() -> None:
    found = scan([OUTSIDE, 0x6000])
    assert found is not None
    assert found.held == frozenset()
    (stack,) = found.stacks
    assert (stack.start, stack.first, stack.end) == (START, SP, END)


def test_inside() -> None:
    found = scan(pc=0x5010)
    assert found is not None
    assert found.held == {0x5010}


def test_saved_program_counter() -> None:
    for words in ([0, 0x5FFF], [0] * 31 + [0x5000]):
        found = scan(words)
        assert found is not None
        assert found.held == {words[-1]}


def test_stack_pointer_that_is_not_aligned() -> None:
    stack = b"\0" * 4 + struct.pack("<Q", 0x5008) + bytes(END - SP - 8)
    found = scan_sample(
        StackSample(pc=OUTSIDE, sp=SP + 4, stack=stack),
        find_resident=lambda _first, _end: (),
        stacks=StackMap((mapping(START, END),)),
        ranges=CODE,
    )
    assert found is not None
    assert found.held == {0x5008}
    assert found.stacks[0].first == SP + 8


def test_stack_that_goes_on_behind_the_sample() -> None:
    assert scan(size=0x80, resident=((SP, END),)) is None
    # The kernel stopped where no page is: nothing can have been there.
    assert scan(size=0x80) is not None


def test_stack_that_may_go_on_in_the_next_mapping() -> None:
    maps = (mapping(START, END), mapping(END, END + 0x1000, ""))
    assert scan(maps=maps, resident=((END, END + 0x1000),)) is None
    assert scan(maps=maps) is not None


@pytest.mark.parametrize("maps", [(), (mapping(START, END, "[heap]"),)])
def test_stack_of_no_thread(maps: tuple[Mapping, ...]) -> None:
    assert scan(maps=maps) is None


@pytest.mark.parametrize(("saved_sp", "is_told"), [(SP + 0x80, True), (START, False), (0, False)])
def test_signal_frame_that_interrupted_another_stack(saved_sp: int, is_told: bool) -> None:
    words = [saved_sp, *[0] * (FRAME_SP_WORDS - 1), FRAME_SEGMENTS]
    assert (scan(words) is not None) is is_told
