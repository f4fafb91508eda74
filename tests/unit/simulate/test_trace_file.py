# SPDX-License-Identifier: Apache-2.0
"""Trace files: written and read back, and what is wrong with others."""

from __future__ import annotations

import io
import json
import math
import struct
import zlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from optpoline.model import Table
from optpoline.simulate.trace import (
    Burst,
    Trace,
    TraceError,
    TracePair,
    TraceSite,
    TraceTarget,
)
from optpoline.simulate.trace_file import TraceWriter, read_trace, write_trace


def make_site(address: int = 0x401136, rate_hz: float | None = 1e6) -> TraceSite:
    """Return a site."""
    return TraceSite(
        module="/usr/bin/lua",
        address=address,
        offset=address - 0x400000,
        function="luaV_execute+0x12",
        kind="jump",
        rate_hz=rate_hz,
    )


def make_burst(pairs: list[int], start_ns: int = 1000, n_dropped: int = 0) -> Burst:
    """Return a burst of 100 us."""
    return Burst(
        start_ns=start_ns,
        end_ns=start_ns + 100_000,
        pairs=np.array(pairs, np.uint32),
        marks=np.array([[len(pairs), start_ns + 90_000]], np.int64),
        n_dropped=n_dropped,
        n_unknown=3,
    )


def make_trace(*bursts: Burst, n_pairs: int = 2) -> Trace:
    """Return a trace of one site."""
    return Trace(
        program="lua -e 1",
        sites=(make_site(),),
        targets=tuple(TraceTarget(address=64 * i, symbol=None) for i in range(n_pairs)),
        pairs=tuple(TracePair(0, i) for i in range(n_pairs)),
        bursts=bursts,
        notes=("one",),
    )


def write(path: Path, trace: Trace) -> bytes:
    """Write a trace; return its bytes."""
    with path.open("wb") as stream:
        write_trace(stream, trace)
    return path.read_bytes()


@pytest.mark.parametrize("n_pairs", [2, 300, 70_000])
def test_round_trip(tmp_path: Path, n_pairs: int) -> None:
    rng = np.random.default_rng(1)
    numbers = [int(n) for n in rng.integers(n_pairs, size=5000)] + [n_pairs - 1]
    trace = make_trace(
        make_burst(numbers), make_burst([], 200_000), make_burst([1], 400_000, 7), n_pairs=n_pairs
    )
    write(tmp_path / "a", trace)
    back = read_trace(tmp_path / "a")
    assert (back.program, back.sites, back.notes) == (trace.program, trace.sites, trace.notes)
    assert (back.targets, back.pairs) == (trace.targets, trace.pairs)
    assert (back.n_branches, back.n_dropped, back.n_unknown) == (5002, 7, 9)
    assert back.seconds == 499_000 / 1e9
    for one, other in zip(back.bursts, trace.bursts, strict=True):
        assert np.array_equal(one.pairs, other.pairs)
        assert np.array_equal(one.marks, other.marks)
        assert (one.start_ns, one.end_ns) == (other.start_ns, other.end_ns)
        assert (one.n_dropped, one.n_unknown) == (other.n_dropped, other.n_unknown)


@pytest.mark.parametrize(
    "table", [None, Table(name="handlers", type="int, int"), Table(name="h", type=None)]
)
def test_tables_of_dynamic_calls(tmp_path: Path, table: Table | None) -> None:
    site = replace(make_site(), table=table, max_guards=2)
    write(tmp_path / "a", replace(make_trace(make_burst([1])), sites=(site,)))
    assert read_trace(tmp_path / "a").sites == (site,)


@pytest.mark.parametrize(("said", "is_plain"), [({}, False), ({"is_plain": True}, True)])
def test_whether_a_site_is_plain(tmp_path: Path, said: dict[str, object], is_plain: bool) -> None:
    (tmp_path / "a").write_bytes(HEAD + PROGRAM + tables(sites=[SITE | said]) + END)
    trace = read_trace(tmp_path / "a")
    assert trace.sites[0].is_plain is is_plain
    write(tmp_path / "b", trace)
    assert read_trace(tmp_path / "b").sites == trace.sites


def test_compact(tmp_path: Path) -> None:
    code = write(tmp_path / "a", make_trace(make_burst([0, 1] * 50_000)))
    assert len(code) < 2_000


def test_tables_grow_before_their_use(tmp_path: Path) -> None:
    stream = io.BytesIO()
    writer = TraceWriter(stream, "p")
    writer.add_tables([make_site()], [TraceTarget(address=1, symbol="f")], [TracePair(0, 0)])
    writer.add_burst(make_burst([0, 0]))
    with pytest.raises(ValueError, match="pair 1 is not one of 1"):
        writer.add_burst(make_burst([1]))
    writer.add_tables([], [TraceTarget(address=2, symbol=None)], [TracePair(0, 1)], ["late"])
    writer.add_burst(make_burst([1, 0]))
    writer.finish()
    (tmp_path / "a").write_bytes(stream.getvalue())
    trace = read_trace(tmp_path / "a")
    assert [list(burst.pairs) for burst in trace.bursts] == [[0, 0], [1, 0]]
    assert trace.notes == ("late",)


def test_every_cut_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = write(path, make_trace(make_burst([0, 1]), make_burst([1], 300_000)))
    for size in range(len(code)):
        path.write_bytes(code[:size])
        with pytest.raises(TraceError) as caught:
            read_trace(path)
        words = "is not an optpoline trace" if size < 16 else "is cut short after"
        assert words in str(caught.value)
        assert "\n" not in str(caught.value)
        assert caught.value.exit_code == 1


def test_every_changed_byte_is_told(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = write(path, make_trace(make_burst([0, 1])))
    reserved = range(12, 16)
    for off in set(range(len(code))) - set(reserved):
        path.write_bytes(code[:off] + bytes((code[off] ^ 0x41,)) + code[off + 1 :])
        with pytest.raises(TraceError):
            read_trace(path)


def test_newer_version(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = write(path, make_trace(make_burst([0])))
    path.write_bytes(code[:8] + struct.pack("<I", 2) + code[12:])
    with pytest.raises(TraceError, match="of version 2; this optpoline reads version 1"):
        read_trace(path)


def test_more_behind_the_end(tmp_path: Path) -> None:
    path = tmp_path / "a"
    code = write(path, make_trace(make_burst([0])))
    path.write_bytes(code + b"x")
    with pytest.raises(TraceError, match="something follows its end"):
        read_trace(path)


def frame(tag: bytes, payload: bytes) -> bytes:
    """Return one frame with a right checksum."""
    return struct.pack("<4sII", tag, len(payload), zlib.crc32(payload)) + payload


SITE: dict[str, object] = {
    "module": "m",
    "address": 1,
    "offset": 1,
    "function": None,
    "kind": "call",
    "rate_hz": None,
}


def tables(**changes: object) -> bytes:
    """Return a frame of tables, some of them replaced."""
    document: dict[str, object] = {
        "sites": [SITE],
        "targets": [{"address": 1, "symbol": None}],
        "pairs": [[0, 0]],
        "notes": [],
    }
    return frame(b"PAIR", json.dumps(document | changes).encode())


def burst(
    pairs: bytes, *, n_pairs: int = 1, n_marks: int = 0, width: int = 1, end_ns: int = 2
) -> bytes:
    """Return a frame of a burst."""
    head = struct.pack("<QQQQIIII", 1, end_ns, 0, 0, n_pairs, n_marks, width, 0)
    return frame(b"BRST", head + zlib.compress(pairs))


HEAD = b"OPTTRACE" + struct.pack("<II", 1, 0)
PROGRAM = frame(b"HEAD", b'{"program": "p"}')
END = frame(b"TEND", b"")


@pytest.mark.parametrize(
    ("frames", "words"),
    [
        ([tables(), END], "it has no head"),
        ([frame(b"HEAD", b"{}"), END], "names no program"),
        ([frame(b"HEAD", b"["), END], "not JSON"),
        ([frame(b"HEAD", b"\xff"), END], "not JSON"),
        ([frame(b"HEAD", b"[]"), END], "no object"),
        ([PROGRAM, frame(b"WHAT", b""), END], "unknown kind"),
        ([PROGRAM, tables(sites=[{"module": 1}]), END], "not a site"),
        ([frame(b"HEAD", b"[" * 100_000), END], "not JSON"),
        ([PROGRAM, tables(targets=[7]), END], "not a target"),
        ([PROGRAM, tables(targets=[{"address": 1 << 70, "symbol": None}]), END], "not a target"),
        ([PROGRAM, tables(sites=[SITE | {"rate_hz": math.inf}]), END], "not a site"),
        ([PROGRAM, tables(sites=[SITE | {"address": -1}]), END], "not a site"),
        ([PROGRAM, tables(sites=[SITE | {"table": "t"}]), END], "not a table"),
        ([PROGRAM, tables(sites=[SITE | {"table": {"name": "t", "type": 1}}]), END], "not a table"),
        ([PROGRAM, tables(sites=[SITE | {"max_guards": -1}]), END], "not a number of guards"),
        ([PROGRAM, tables(sites=[SITE | {"max_guards": True}]), END], "not a number of guards"),
        ([PROGRAM, tables(sites=[SITE | {"is_plain": 1}]), END], "not a site"),
        ([PROGRAM, tables(), burst(b"\0", end_ns=1 << 63), END], "times of a burst"),
        ([PROGRAM, tables(), burst(b"\0", end_ns=0), END], "times of a burst"),
        ([PROGRAM, tables(pairs=[[0, 1]]), END], "is no pair"),
        ([PROGRAM, tables(pairs=[[-1, 0]]), END], "is no pair"),
        ([PROGRAM, tables(notes=None), END], "no table of notes"),
        ([PROGRAM, tables(), burst(b"\1"), END], "a pair that there is not"),
        ([PROGRAM, tables(), burst(b"\0\0"), END], "another length"),
        ([PROGRAM, tables(), burst(b"\0", width=3), END], "head of a burst"),
        ([PROGRAM, tables(), burst(b"\0", n_marks=9999), END], "head of a burst"),
        ([PROGRAM, tables(), burst(b"\0", n_pairs=1 << 31), END], "head of a burst"),
        ([PROGRAM, tables(), frame(b"BRST", bytes(8)), END], "without a head"),
        ([PROGRAM, tables(), frame(b"BRST", bytes(44) + b"\1\0\0\0?"), END], "head of a burst"),
    ],
)
def test_damage_that_checksums_do_not_show(tmp_path: Path, frames: list[bytes], words: str) -> None:
    (tmp_path / "a").write_bytes(HEAD + b"".join(frames))
    with pytest.raises(TraceError, match=words):
        read_trace(tmp_path / "a")


def test_bomb_is_not_unpacked(tmp_path: Path) -> None:
    frames = [PROGRAM, tables(), burst(bytes(1 << 26)), END]
    (tmp_path / "a").write_bytes(HEAD + b"".join(frames))
    with pytest.raises(TraceError, match="another length"):
        read_trace(tmp_path / "a")


def test_traces_of_before_say_nothing_of_tables(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(HEAD + PROGRAM + tables() + END)
    (site,) = read_trace(tmp_path / "a").sites
    assert (site.table, site.max_guards) == (None, 0)
