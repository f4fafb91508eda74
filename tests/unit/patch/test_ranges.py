# SPDX-License-Identifier: Apache-2.0
"""Sets of address ranges agree with a plain comparison of each word with each range."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from optpoline.patch.ranges import AddressRanges

TOP = (1 << 64) - 1
near = st.integers(0, 40)
ranges_near_each_other = st.lists(st.tuples(near, near), max_size=8)
anywhere = st.integers(0, TOP)


def find_plainly(ranges: list[tuple[int, int]], words: list[int]) -> list[int]:
    """Return the words that lie in a range, by the definition."""
    return [word for word in words if any(start <= word < end for start, end in ranges)]


@given(ranges=ranges_near_each_other, words=st.lists(near, max_size=50))
@example(ranges=[(0, 30), (10, 20)], words=[5, 15, 25, 30])
@example(ranges=[(0, 20), (10, 10)], words=[15])
@example(ranges=[(0, 10), (0, 20), (0, 5)], words=[7, 15])
def test_agrees_with_a_plain_comparison(ranges: list[tuple[int, int]], words: list[int]) -> None:
    made = AddressRanges(ranges)
    found = made.pointing_into(np.array(words, dtype=np.uint64))
    assert found.tolist() == find_plainly(ranges, words)
    assert all((word in made) is bool(find_plainly(ranges, [word])) for word in words)


@given(
    starts=st.lists(anywhere, max_size=6),
    sizes=st.lists(st.integers(0, 1 << 40), min_size=6, max_size=6),
    words=st.lists(anywhere, max_size=20),
)
def test_agrees_anywhere(starts: list[int], sizes: list[int], words: list[int]) -> None:
    ranges = [(start, min(TOP, start + size)) for start, size in zip(starts, sizes, strict=False)]
    words += [word for start, end in ranges for word in (start, max(0, end - 1), end)]
    found = AddressRanges(ranges).pointing_into(np.array(words, dtype=np.uint64))
    assert found.tolist() == find_plainly(ranges, words)


def test_no_ranges_hold_nothing() -> None:
    none = AddressRanges([])
    assert len(none) == 0
    assert 0 not in none
    assert none.pointing_into(np.arange(100, dtype=np.uint64)).size == 0


def test_no_words() -> None:
    assert AddressRanges([(1, 2)]).pointing_into(np.array([], dtype=np.uint64)).size == 0


@pytest.mark.parametrize(
    ("ranges", "n"),
    [
        ([(0, 4), (8, 12)], 2),
        ([(8, 12), (0, 4)], 2),
        ([(0, 4), (4, 8)], 1),
        ([(0, 8), (2, 4)], 1),
        ([(0, 4), (0, 4)], 1),
        ([(4, 4)], 0),
        ([(5, 4)], 0),
    ],
)
def test_ranges_that_touch_are_one(ranges: list[tuple[int, int]], n: int) -> None:
    assert len(AddressRanges(ranges)) == n


def test_words_keep_their_order_and_number() -> None:
    words = np.array([18, 3, 11, 3, 40, 12], dtype=np.uint64)
    assert AddressRanges([(10, 20), (0, 5)]).pointing_into(words).tolist() == [18, 3, 11, 3, 12]


def test_memory_as_it_is_read() -> None:
    """Bytes of a program's memory are little-endian words that cannot be written."""
    data = b"".join(word.to_bytes(8, "little") for word in (7, 0x7F00_1000_0010, TOP))
    words = np.frombuffer(data, dtype="<u8")
    ranges = AddressRanges([(0x7F00_1000_0000, 0x7F00_1000_0020)])
    assert ranges.pointing_into(words).tolist() == [0x7F00_1000_0010]


def test_data_among_code() -> None:
    ranges = AddressRanges([(0x10, 0x40), (0x80, 0xC0)], [(0x30, 0x40), (0xA0, 0xC0), (7, 7)])
    assert [at for at in range(0x100) if ranges.is_data(at)] == [
        *range(0x30, 0x40),
        *range(0xA0, 0xC0),
    ]
    assert 0x30 in ranges  # it keeps the code back all the same
    assert not AddressRanges([(0x10, 0x40)]).is_data(0x30)
