# SPDX-License-Identifier: Apache-2.0
"""Handing out and taking back parts of a range, against a map of each of its bytes."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from optpoline.patch.extents import Extent, FreeExtents

START, END = 40, 40 + 400


def align(addr: int, to: int) -> int:
    """Round an address up."""
    return -(-addr // to) * to


class ExtentMachine(RuleBasedStateMachine):
    """Extents beside a bytearray that has 1 where a byte is used."""

    def __init__(self) -> None:
        """Begin with all free."""
        super().__init__()
        self.extents = FreeExtents(START, END)
        self.used = bytearray(END)
        self.used[:START] = b"\1" * START
        self.taken: list[Extent] = []

    def lowest_room(self, size: int, to: int) -> Extent | None:
        """Return what ``find`` should, by the definition."""
        for start in range(START, END):
            is_first = not self.used[start] and self.used[start - 1]
            at = align(start, to)
            is_room = at + size <= END and not any(self.used[start : at + size])
            if is_first and is_room:
                return Extent(start=start, at=at, end=at + size)
        return None

    @rule(size=st.integers(1, 120), to=st.sampled_from([1, 8, 16, 64]), padding=st.integers(0, 16))
    def take(self, size: int, to: int, padding: int) -> None:
        """Take the lowest room there is; the end may be rounded up where that is free."""
        found = self.extents.find(size, lambda addr: align(addr, to))
        assert found == self.lowest_room(size, to)
        if found is None:
            return
        while padding and (found.end + padding > END or any(self.used[found.end :][:padding])):
            padding -= 1
        found = Extent(start=found.start, at=found.at, end=found.end + padding)
        self.extents.take(found)
        self.used[found.start : found.end] = b"\1" * (found.end - found.start)
        self.taken.append(found)

    @precondition(lambda self: self.taken)
    @rule(data=st.data())
    def give(self, data: st.DataObject) -> None:
        """Give any of them back."""
        extent = self.taken.pop(data.draw(st.integers(0, len(self.taken) - 1)))
        self.extents.give(extent)
        assert all(self.used[extent.start : extent.end])
        self.used[extent.start : extent.end] = bytes(extent.end - extent.start)

    @rule(size=st.integers(1, 500))
    def look(self, size: int) -> None:
        """Find without taking, which changes nothing."""
        assert self.extents.find(size, int) == self.lowest_room(size, 1)

    @invariant()
    def free_size_is_right(self) -> None:
        """Count the bytes."""
        assert self.extents.free_size == self.used.count(0)

    @invariant()
    def none_overlap(self) -> None:
        """No byte was handed out twice."""
        ends = sorted((extent.start, extent.end) for extent in self.taken)
        assert all(one[1] <= other[0] for one, other in itertools.pairwise(ends))

    def teardown(self) -> None:
        """All joins again once all is given back."""
        for extent in self.taken:
            self.extents.give(extent)
        whole = Extent(start=START, at=START, end=END)
        assert self.extents.find(END - START, int) == whole
        assert self.extents.free_size == END - START


TestExtents = ExtentMachine.TestCase
TestExtents.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)


@pytest.mark.parametrize(("start", "end"), [(8, 8), (8, 4)])
def test_empty_range_has_no_room(start: int, end: int) -> None:
    extents = FreeExtents(start, end)
    assert extents.free_size == 0
    assert extents.find(1, int) is None


def test_room_must_lie_in_one_piece() -> None:
    extents = FreeExtents(0, 30)
    rooms = [Extent(start=off, at=off, end=off + 10) for off in (0, 10, 20)]
    for room in rooms:
        extents.take(room)
    extents.give(rooms[0])
    extents.give(rooms[2])
    assert extents.free_size == 20
    assert extents.find(11, int) is None
    extents.give(rooms[1])
    assert extents.find(30, int) == Extent(start=0, at=0, end=30)
