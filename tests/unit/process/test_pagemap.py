# SPDX-License-Identifier: Apache-2.0
"""Which pages exist: of our own process, which nobody else writes to."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator

import pytest

from optpoline.process.pagemap import resident_ranges

PAGE = mmap.PAGESIZE
N_PAGES = 64


@pytest.fixture
def addr() -> Iterator[int]:
    """Return where memory is mapped of which pages 3, 4 and 60 exist."""
    memory = mmap.mmap(-1, N_PAGES * PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for page in (3, 4, 60):
        memory[page * PAGE] = 1
    view = (ctypes.c_char * len(memory)).from_buffer(memory)
    yield ctypes.addressof(view)
    del view
    memory.close()


def find(addr: int, *ranges: tuple[int, int]) -> list[tuple[tuple[int, int], ...]]:
    """Return the existing parts of ranges of bytes from ``addr`` on."""
    found = resident_ranges(os.getpid(), [(addr + start, addr + end) for start, end in ranges])
    return [tuple((start - addr, end - addr) for start, end in parts) for parts in found]


def test_pages_that_were_written(addr: int) -> None:
    assert find(addr, (0, N_PAGES * PAGE), (5 * PAGE, 60 * PAGE)) == [
        ((3 * PAGE, 5 * PAGE), (60 * PAGE, 61 * PAGE)),
        (),
    ]


def test_range_that_begins_inside_a_page(addr: int) -> None:
    first = 4 * PAGE + 8
    assert find(addr, (first, 60 * PAGE + 16)) == [((first, 5 * PAGE), (60 * PAGE, 60 * PAGE + 16))]


def test_all_may_exist_where_it_cannot_be_told(addr: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> int:
        raise PermissionError

    monkeypatch.setattr(os, "open", refuse)
    assert find(addr, (0, PAGE), (PAGE, 2 * PAGE)) == [((0, PAGE),), ((PAGE, 2 * PAGE),)]
