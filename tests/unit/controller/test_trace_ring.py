# SPDX-License-Identifier: Apache-2.0
"""Emptying a ring that others write: order, holes, laps, and what was lost."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.trace_ring import RingReader
from optpoline.model import Addr, TraceRing

N = 16
RING = TraceRing(head_addr=Addr(0x1000), entries_addr=Addr(0x1040), n_entries=N, ids=())


class Writer:
    """The program's end of a ring; what a reader sees of an arena."""

    def __init__(self) -> None:
        """Have written nothing."""
        self.head = 0
        self.entries = np.zeros(N, np.uint32)
        self.while_copied = 0
        """Entries written between a reader's two looks at the head."""
        self._looks = 0

    def load_u64(self, addr: Addr) -> int:
        """Return the head."""
        assert addr == RING.head_addr
        self._looks += 1
        if self.while_copied and self._looks % 2 == 0:
            self.write(*range(901, 901 + self.while_copied))
            self.while_copied = 0
        return self.head

    def view_u32(self, addr: Addr, n_words: int) -> NDArray[np.uint32]:
        """Return the entries."""
        assert (addr, n_words) == (RING.entries_addr, N)
        return self.entries

    def take(self) -> int:
        """Take a number, as a thread does that writes later."""
        self.head += 1
        return self.head - 1

    def put(self, number: int, value: int) -> None:
        """Write what a number was taken for."""
        self.entries[number % N] = value

    def write(self, *values: int) -> None:
        """Take numbers and write at once."""
        for value in values:
            self.put(self.take(), value)


def make_reader(writer: Writer) -> RingReader:
    """Return a reader that has begun."""
    reader = RingReader(writer, RING)
    reader.begin()
    return reader


def read(reader: RingReader) -> list[int]:
    """Read all that there is."""
    return [int(value) for value in reader.read(reader.head())]


def test_in_order_over_many_laps() -> None:
    writer = Writer()
    reader = make_reader(writer)
    written: list[int] = []
    found: list[int] = []
    for step in range(100):
        values = list(range(1 + 7 * step, 1 + 7 * step + step % N))
        writer.write(*values)
        written += values
        found += read(reader)
    assert found == written
    assert reader.n_dropped == 0


def test_begins_where_the_head_is() -> None:
    writer = Writer()
    writer.write(1, 2, 3)
    reader = make_reader(writer)
    assert read(reader) == []
    writer.write(4)
    assert read(reader) == [4]


def test_waits_for_who_is_under_way() -> None:
    writer = Writer()
    reader = make_reader(writer)
    writer.write(1)
    held_up = writer.take()
    writer.write(3)
    assert read(reader) == [1]
    assert read(reader) == []
    writer.put(held_up, 2)
    assert read(reader) == [2, 3]
    assert reader.n_dropped == 0


def test_gives_up_with_half_a_ring_behind() -> None:
    writer = Writer()
    reader = make_reader(writer)
    writer.take()
    writer.write(*range(2, N // 2 + 1))
    assert read(reader) == []
    writer.write(99)
    assert read(reader) == [*range(2, N // 2 + 1), 99]
    assert reader.n_dropped == 1


def test_overrun_keeps_the_last_lap() -> None:
    writer = Writer()
    reader = make_reader(writer)
    writer.write(*range(1, 41))
    assert read(reader) == list(range(41 - N, 41))
    assert reader.n_dropped == 40 - N
    writer.write(50)
    assert read(reader) == [50]
    reader.begin()
    assert reader.n_dropped == 0


def test_what_is_written_again_while_it_is_copied_is_dropped() -> None:
    writer = Writer()
    reader = make_reader(writer)
    writer.write(*range(1, N + 1))
    writer._looks = 0
    writer.while_copied = 4
    found = read(reader)
    # The four oldest were overwritten by then; those after are as they were.
    assert found == list(range(5, N + 1))
    assert reader.n_dropped == 4


def test_cleared() -> None:
    writer = Writer()
    reader = make_reader(writer)
    writer.write(1, 2)
    reader.clear()
    assert not writer.entries.any()
    reader.close()
    writer.write(3)
    assert writer.entries.any()
