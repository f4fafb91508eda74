# SPDX-License-Identifier: Apache-2.0
"""Function ranges from symbols and from both forms of unwind table agree."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np

from optpoline.discover import ModuleImage
from optpoline.discover.functions import (
    FunctionIndex,
    FunctionTable,
    Span,
    read_frame_ranges,
    read_unwind_ranges,
)
from optpoline.discover.text import FileMemory, SegmentBytes
from optpoline.model import Addr

Build = Callable[..., Path]


def table(*rows: tuple[int, int]) -> FunctionTable:
    array = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return FunctionTable(array[:, 0], array[:, 1])


def test_both_unwind_tables_say_what_symbols_say(build: Build) -> None:
    program = build("sites_virtual.cc", "-O2", "-lstdc++")
    facts = ModuleImage.from_file(str(program)).facts
    data = program.read_bytes()
    memory = FileMemory(
        [
            SegmentBytes(segment=s, data=data[s.file_off : s.file_off + s.file_size])
            for s in facts.segments
        ]
    )
    spans = []
    for place in (facts.eh_frame_hdr, facts.eh_frame):
        assert place is not None
        spans.append(Span(Addr(place[0]), Addr(place[0] + place[1])))
    sorted_rows = np.stack(read_unwind_ranges(memory, spans[0]), axis=1).tolist()
    frame_rows = np.stack(read_frame_ranges(memory, spans[1]), axis=1).tolist()
    assert sorted_rows == sorted(frame_rows)
    listing = subprocess.run(
        ["nm", "-S", str(program)], check=True, capture_output=True, text=True
    ).stdout
    named = {
        (int(row[0], 16), int(row[1], 16))
        for row in (line.split() for line in listing.splitlines())
        if len(row) == 4 and row[2] in "tTW"
    }
    assert len(named) >= 4
    assert named <= {(start, size) for start, size in sorted_rows}


def test_unreadable_tables_give_no_function() -> None:
    nowhere = Span(Addr(0x1000), Addr(0x1100))
    for read in (read_unwind_ranges, read_frame_ranges):
        starts, sizes = read(FileMemory([]), nowhere)
        assert starts.size == sizes.size == 0


def test_ranges() -> None:
    functions = table((0x100, 0x20), (0x120, 0), (0x200, 8), (0x200, 0x10))
    assert functions.find(0x11F) == Span(Addr(0x100), Addr(0x120))
    assert functions.find(0x1FF) == Span(Addr(0x120), Addr(0x200), is_exact=False)
    assert functions.find(0x20F) == Span(Addr(0x200), Addr(0x210))
    assert functions.find(0x210) is None
    assert functions.find(0xFF) is None
    assert len(functions) == 3


def test_sources_are_merged() -> None:
    index = FunctionIndex(table((0x100, 0x20), (0x130, 0)), table((0x110, 0x40)), [0x80])
    assert index.find(0x118) == Span(Addr(0x110), Addr(0x150))
    assert index.is_start(0x110)
    assert index.is_inside(0x118)
    assert not index.is_inside(0x130)
    assert not index.is_inside(0x160)
    addrs = np.array([0x7F, 0x80, 0xFF, 0x12F], dtype=np.int64)
    assert index.boundaries_before(addrs).tolist() == [0, 0x80, 0x80, 0x110]


def test_addresses_that_no_program_has_are_no_boundaries() -> None:
    """Headers of a damaged file may hold any number of 64 bits."""
    index = FunctionIndex(table((0x1000, 16)), table(), [0x2000, 1 << 63, (1 << 64) - 1])
    addrs = np.array([0x1008, 0x2008, (1 << 63) - 1], dtype=np.int64)
    assert index.boundaries_before(addrs).tolist() == [0x1000, 0x2000, 0x2000]
