# SPDX-License-Identifier: Apache-2.0
"""Trace files: written frame by frame while a program runs, read whole.

All numbers are little-endian. A file is::

    8   "OPTTRACE"
    u32 version (1)
    u32 0
    frames, each:
        4   tag
        u32 size of the payload in bytes
        u32 CRC-32 of the payload
        payload

    HEAD    JSON {program}, once, first
    PAIR    JSON {sites, targets, pairs, notes}: rows added to the tables, before their first use
    BRST    one burst: u64 start_ns, u64 end_ns, u64 n_dropped, u64 n_unknown,
            u32 n_pairs, u32 n_marks, u32 width (1, 2 or 4 bytes a pair), u32 0,
            marks: n_marks x (u64 branches made, u64 CLOCK_MONOTONIC ns), then
            pairs: n_pairs numbers of ``width`` bytes, zlib-compressed
    TEND    empty, once, last: the recorder came to its end

A number of a pair takes as few bytes as fit the burst; sequences of branches repeat
themselves and compress to a few bits each. A tag that is not known is an error: what
changes the meaning of a file raises the version.
"""

from __future__ import annotations

import io
import json
import struct
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from optpoline.model import Table
from optpoline.simulate.trace import (
    Burst,
    Trace,
    TraceError,
    TracePair,
    TraceSite,
    TraceTarget,
)

__all__ = ["VERSION", "TraceWriter", "read_trace", "write_trace"]

MAGIC = b"OPTTRACE"
VERSION = 1

MAX_FRAME_SIZE = 1 << 28
"""Bytes of the longest payload that is believed; a ring of 64 Ki entries makes 256 KiB."""

MAX_BURST_PAIRS = 1 << 26

MAX_NS = 1 << 62
MAX_ADDR = 1 << 63
MAX_RATE_HZ = 1e15
"""Beyond these no time, address or rate of a program is."""

_FILE = struct.Struct("<8sII")
_FRAME = struct.Struct("<4sII")
_BURST = struct.Struct("<QQQQIIII")

_HEAD, _PAIR, _BRST, _TEND = b"HEAD", b"PAIR", b"BRST", b"TEND"

_ZLIB_LEVEL = 1
"""Fast: writing shares a core with what is recorded."""

_DTYPES: dict[int, np.dtype[np.unsignedinteger]] = {
    width: np.dtype(f"<u{width}") for width in (1, 2, 4)
}


class TraceWriter:
    """Writes one trace to a stream.

    Args:
        stream: A binary file open for writing; only ever appended to.
        program: What is recorded, for people.
    """

    def __init__(self, stream: BinaryIO, program: str) -> None:
        """Write the head."""
        self._stream = stream
        self._n_pairs = 0
        stream.write(_FILE.pack(MAGIC, VERSION, 0))
        self._frame(_HEAD, json.dumps({"program": program}).encode())

    def add_tables(
        self,
        sites: Sequence[TraceSite],
        targets: Sequence[TraceTarget],
        pairs: Sequence[TracePair],
        notes: Sequence[str] = (),
    ) -> None:
        """Add rows to the tables; numbers go on from those before."""
        self._n_pairs += len(pairs)
        document = {
            "sites": [asdict(site) for site in sites],
            "targets": [asdict(target) for target in targets],
            "pairs": [(pair.site, pair.target) for pair in pairs],
            "notes": list(notes),
        }
        self._frame(_PAIR, json.dumps(document, separators=(",", ":")).encode())

    def add_burst(self, burst: Burst) -> None:
        """Add one burst.

        Raises:
            ValueError: if it names a pair that is not in the tables.
        """
        top = int(burst.pairs.max(initial=0))
        if len(burst.pairs) and top >= self._n_pairs:
            raise ValueError(f"pair {top} is not one of {self._n_pairs}")
        width = 1 if top < 1 << 8 else 2 if top < 1 << 16 else 4
        numbers = burst.pairs.astype(_DTYPES[width]).tobytes()
        head = _BURST.pack(
            burst.start_ns,
            burst.end_ns,
            burst.n_dropped,
            burst.n_unknown,
            len(burst.pairs),
            len(burst.marks),
            width,
            0,
        )
        marks = burst.marks.astype("<u8").tobytes()
        self._frame(_BRST, head + marks + zlib.compress(numbers, _ZLIB_LEVEL))

    def finish(self) -> None:
        """Say that nothing is missing at the end."""
        self._frame(_TEND, b"")
        self._stream.flush()

    def _frame(self, tag: bytes, payload: bytes) -> None:
        """Write one frame."""
        self._stream.write(_FRAME.pack(tag, len(payload), zlib.crc32(payload)) + payload)


def write_trace(stream: BinaryIO, trace: Trace) -> None:
    """Write a whole trace."""
    writer = TraceWriter(stream, trace.program)
    writer.add_tables(trace.sites, trace.targets, trace.pairs, trace.notes)
    for burst in trace.bursts:
        writer.add_burst(burst)
    writer.finish()


def read_trace(path: Path) -> Trace:
    """Return what a trace file holds.

    Raises:
        TraceError: if it is no trace, damaged, cut short, or of a newer version.
        OSError: if it cannot be read.
    """
    with path.open("rb") as stream:
        return _Reader(stream, str(path)).read()


class _Reader:
    """One file being read."""

    def __init__(self, stream: BinaryIO, name: str) -> None:
        """Check what kind of file it is."""
        self._stream = stream
        self._name = name
        self._sites: list[TraceSite] = []
        self._targets: list[TraceTarget] = []
        self._pairs: list[TracePair] = []
        self._bursts: list[Burst] = []
        self._notes: list[str] = []
        head = stream.read(_FILE.size)
        if head[: len(MAGIC)] != MAGIC or len(head) < _FILE.size:
            raise TraceError(f"{name} is not an optpoline trace")
        _, version, _ = _FILE.unpack(head)
        if version != VERSION:
            raise TraceError(
                f"{name} is a trace of version {version}; this optpoline reads version {VERSION}",
                hint="use the optpoline that wrote it, or a newer one",
            )

    def read(self) -> Trace:
        """Read all frames."""
        frames = self._frames()
        tag, payload = next(frames)
        if tag != _HEAD:
            raise self._damaged("it has no head")
        program = self._program(payload)
        for tag, payload in frames:
            if tag == _PAIR:
                self._take_tables(payload)
            elif tag == _BRST:
                self._bursts.append(self._burst(payload))
            else:
                raise self._damaged(f"a frame of unknown kind {tag!r}")
        return Trace(
            program=program,
            sites=tuple(self._sites),
            targets=tuple(self._targets),
            pairs=tuple(self._pairs),
            bursts=tuple(self._bursts),
            notes=tuple(self._notes),
        )

    def _damaged(self, what: str) -> TraceError:
        """Return the error that says so."""
        return TraceError(f"{self._name} is a damaged trace: {what}")

    def _frames(self) -> Iterator[tuple[bytes, bytes]]:
        """Yield (tag, payload) of each frame but the last, which must be there."""
        while True:
            head = self._stream.read(_FRAME.size)
            if len(head) < _FRAME.size:
                raise TraceError(
                    f"{self._name} is cut short after {len(self._bursts)} bursts",
                    hint="record it again: its recorder did not come to its end",
                )
            tag, size, checksum = _FRAME.unpack(head)
            if size > MAX_FRAME_SIZE:
                raise self._damaged(f"a frame of {size} bytes")
            payload = self._stream.read(size)
            if len(payload) < size:
                raise TraceError(
                    f"{self._name} is cut short after {len(self._bursts)} bursts",
                    hint="record it again: its recorder did not come to its end",
                )
            if zlib.crc32(payload) != checksum:
                raise self._damaged(f"the checksum of burst or table {len(self._bursts)} is wrong")
            if tag == _TEND:
                if self._stream.read(1):
                    raise self._damaged("something follows its end")
                return
            yield tag, payload

    def _json(self, payload: bytes) -> dict[str, object]:
        """Return a JSON object."""
        try:
            document = json.load(io.BytesIO(payload))
        except (ValueError, RecursionError) as error:
            raise self._damaged("a table is not JSON") from error
        if not isinstance(document, dict):
            raise self._damaged("a table is no object")
        return document

    def _program(self, payload: bytes) -> str:
        """Return the name in the head."""
        program = self._json(payload).get("program")
        if not isinstance(program, str):
            raise self._damaged("its head names no program")
        return program

    def _rows(self, document: dict[str, object], key: str) -> list[object]:
        """Return the rows of one table."""
        rows = document.get(key)
        if not isinstance(rows, list):
            raise self._damaged(f"it has no table of {key}")
        return rows

    def _take_tables(self, payload: bytes) -> None:
        """Add rows to the tables."""
        document = self._json(payload)
        try:
            self._sites += [_site(row) for row in self._rows(document, "sites")]
            self._targets += [_target(row) for row in self._rows(document, "targets")]
        except ValueError as error:
            raise self._damaged(str(error)) from error
        for row in self._rows(document, "pairs"):
            match row:
                case [int(site), int(target)] if 0 <= site < len(self._sites) and 0 <= target < len(
                    self._targets
                ):
                    self._pairs.append(TracePair(site, target))
                case _:
                    raise self._damaged(f"{row!r} is no pair")
        self._notes += [str(note) for note in self._rows(document, "notes")]

    def _burst(self, payload: bytes) -> Burst:
        """Return one burst."""
        if len(payload) < _BURST.size:
            raise self._damaged("a burst without a head")
        start_ns, end_ns, n_dropped, n_unknown, n_pairs, n_marks, width, _ = _BURST.unpack_from(
            payload
        )
        data_off = _BURST.size + 16 * n_marks
        if width not in _DTYPES or n_pairs > MAX_BURST_PAIRS or data_off > len(payload):
            raise self._damaged("the head of a burst is wrong")
        words = np.frombuffer(payload, "<u8", 2 * n_marks, _BURST.size).reshape(-1, 2)
        is_in_time = start_ns <= end_ns <= MAX_NS and bool(np.all(words[:, 1] <= MAX_NS))
        if not is_in_time or bool(np.any(words[:, 0] > n_pairs)):
            raise self._damaged("the times of a burst are wrong")
        marks = words.astype(np.int64)
        try:
            # Bounded: what a few damaged bytes unpack to may be anything.
            numbers = zlib.decompressobj().decompress(payload[data_off:], n_pairs * width + 1)
        except zlib.error as error:
            raise self._damaged("a burst cannot be unpacked") from error
        if len(numbers) != n_pairs * width:
            raise self._damaged("a burst has another length than it says")
        pairs: NDArray[np.uint32] = np.frombuffer(numbers, _DTYPES[width]).astype(np.uint32)
        if len(pairs) and int(pairs.max()) >= len(self._pairs):
            raise self._damaged("a burst names a pair that there is not")
        return Burst(
            start_ns=start_ns,
            end_ns=end_ns,
            pairs=pairs,
            marks=marks,
            n_dropped=n_dropped,
            n_unknown=n_unknown,
        )


def _site(row: object) -> TraceSite:
    """Return a site from an object of JSON.

    Raises:
        ValueError: if a field is missing or of another type.
    """
    match row:
        case {
            "module": str(module),
            "address": int(address),
            "offset": int(offset),
            "function": str() | None as function,
            "kind": str(kind),
            "rate_hz": int() | float() | None as rate_hz,
            **rest,
        } if 0 <= address < MAX_ADDR and (rate_hz is None or 0 <= rate_hz < MAX_RATE_HZ):
            # Traces of earlier releases say nothing of tables and plain sites.
            is_plain = rest.get("is_plain", False)
            if not isinstance(is_plain, bool):
                raise ValueError("not a site")
            return TraceSite(
                module=module,
                address=address,
                offset=offset,
                function=function,
                kind=kind,
                rate_hz=rate_hz,
                table=_table(rest.get("table")),
                max_guards=_max_guards(rest.get("max_guards", 0)),
                is_plain=is_plain,
            )
        case _:
            raise ValueError("not a site")


def _table(row: object) -> Table | None:
    """Return a table of dynamic calls from an object of JSON, or None.

    Raises:
        ValueError: if a field is missing or of another type.
    """
    match row:
        case None:
            return None
        case {"name": str(name), "type": str() | None as type_}:
            return Table(name=name, type=type_)
        case _:
            raise ValueError("not a table")


def _max_guards(value: object) -> int:
    """Return a limit of guards from JSON.

    Raises:
        ValueError: if it is none.
    """
    match value:
        case bool():
            raise ValueError("not a number of guards")
        case int(n) if n >= 0:
            return n
        case _:
            raise ValueError("not a number of guards")


def _target(row: object) -> TraceTarget:
    """Return a target from an object of JSON.

    Raises:
        ValueError: if a field is missing or of another type.
    """
    match row:
        case {
            "address": int(address),
            "symbol": str() | None as symbol,
        } if 0 <= address < MAX_ADDR:
            return TraceTarget(address=address, symbol=symbol)
        case _:
            raise ValueError("not a target")
