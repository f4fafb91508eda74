# SPDX-License-Identifier: Apache-2.0
"""Where functions begin and end, from symbols and unwind tables.

Unwind tables are there in stripped files too: ``.eh_frame_hdr`` is mapped, and
is a sorted table of function starts. The two sources are kept apart, because a
symbol may name a part of what unwinds as one function, and the other way round.
"""

from __future__ import annotations

import struct
from bisect import bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.process.memory import Memory
from optpoline.x86.decode import AddrArray

__all__ = [
    "FunctionIndex",
    "FunctionTable",
    "Span",
    "read_frame_ranges",
    "read_unwind_ranges",
]

_HDR_FORMAT = struct.Struct("<BBBBiI")
"""version, three encodings, offset of .eh_frame, number of entries."""

_HDR_ENCODINGS = (0x1B, 0x03, 0x3B)
"""What every linker writes: pcrel sdata4, udata4, and a table of datarel sdata4 pairs."""

_FDE = struct.Struct("<IIiI")
"""Head of an FDE: length, distance to its CIE, pc_begin, pc_range; a CIE's distance is 0."""

_EXTENDED_LENGTH = 0xFFFFFFFF
"""A length in 64 bits follows; nobody writes that, and 0 ends the section."""

_AUGMENTATIONS = (b"zR", b"zRS", b"zPR", b"zLR", b"zPLR")
_PCREL_SDATA4 = 0x1B


_END_ADDR = 1 << 63
"""Behind all addresses of programs."""


@dataclass(frozen=True, slots=True)
class Span:
    """Addresses from ``start`` up to, not including, ``end``.

    ``is_exact`` tells whether the end is known, or merely the next start.
    """

    start: Addr
    end: Addr
    is_exact: bool = True

    def __contains__(self, addr: int) -> bool:
        """Say whether an address lies in it."""
        return self.start <= addr < self.end


class FunctionTable:
    """Function ranges of one source, sorted.

    Args:
        starts: Where functions begin, in any order.
        sizes: Their sizes in bytes; one of size 0 lasts until the next.
    """

    def __init__(self, starts: AddrArray, sizes: AddrArray) -> None:
        """Sort the functions and settle their ends."""
        order = np.lexsort((-sizes, starts))
        starts, sizes = starts[order], sizes[order]
        is_first = np.ones(starts.size, dtype=np.bool_)
        is_first[1:] = starts[1:] != starts[:-1]
        starts, sizes = starts[is_first], sizes[is_first]
        following = np.append(starts[1:], starts[-1:])
        ends = np.where(sizes > 0, starts + sizes, following)
        self.starts: list[int] = starts.tolist()
        self._ends: list[int] = ends.tolist()
        self._is_exact: list[bool] = (sizes > 0).tolist()
        self._start_set = frozenset(self.starts)

    def __len__(self) -> int:
        """Return the number of functions."""
        return len(self.starts)

    def is_start(self, addr: int) -> bool:
        """Say whether a function begins at an address."""
        return addr in self._start_set

    def find(self, addr: int) -> Span | None:
        """Return the function that an address is in, or None."""
        index = bisect_right(self.starts, addr) - 1
        if index < 0 or addr >= self._ends[index]:
            return None
        return Span(Addr(self.starts[index]), Addr(self._ends[index]), self._is_exact[index])


class FunctionIndex:
    """What symbols and unwind table together say about a module's functions.

    Args:
        named: From the symbol table.
        unwound: From the unwind table.
        boundaries: Other addresses at which an instruction begins: sections, the entry.
    """

    def __init__(
        self, named: FunctionTable, unwound: FunctionTable, boundaries: Iterable[int]
    ) -> None:
        """Merge the starts of both sources."""
        self.named = named
        self.unwound = unwound
        # A damaged file's headers name any address.
        others = (addr for addr in boundaries if 0 <= addr < _END_ADDR)
        self._boundaries = sorted({*named.starts, *unwound.starts, *others})

    def is_start(self, addr: int) -> bool:
        """Say whether a function begins at an address."""
        return self.named.is_start(addr) or self.unwound.is_start(addr)

    def starts(self) -> AddrArray:
        """Return where functions begin, unsorted, with repetitions."""
        return np.array(self.named.starts + self.unwound.starts, dtype=np.int64)

    def find(self, addr: int) -> Span | None:
        """Return the widest function that an address is in, or None."""
        spans = [s for s in (self.named.find(addr), self.unwound.find(addr)) if s is not None]
        return max(spans, key=lambda span: span.end - span.start, default=None)

    def is_inside(self, addr: int) -> bool:
        """Say whether an address is surely within a function, behind its first instruction."""
        if self.is_start(addr):
            return False
        spans = (self.named.find(addr), self.unwound.find(addr))
        return any(span is not None and span.is_exact for span in spans)

    def boundaries_before(self, addrs: AddrArray) -> AddrArray:
        """Return the last known instruction boundary at or below each address, 0 if none."""
        known = np.array([0, *self._boundaries], dtype=np.int64)
        before: AddrArray = known[np.searchsorted(known, addrs, side="right") - 1]
        return before


def read_unwind_ranges(memory: Memory, hdr: Span) -> tuple[AddrArray, AddrArray]:
    """Read start and size of each function from an ``.eh_frame_hdr`` in memory.

    An encoding that no known linker writes, or a table that cannot be read,
    gives no functions; an FDE that is not laid out as usual gives size 0.
    """
    none = np.zeros(0, dtype=np.int64)
    try:
        table = _read_search_table(memory, hdr)
        if table.size == 0:
            return none, none
        starts, fde_addrs = table[:, 0], table[:, 1]
        lowest = int(fde_addrs.min())
        raw = memory.read(Addr(lowest), int(fde_addrs.max()) + _FDE.size - lowest)
    except TargetFault:
        return none, none
    words = np.ndarray(shape=(len(raw) - 3,), dtype="<i4", buffer=raw, strides=(1,))
    offs = fde_addrs - lowest
    pc_begins = fde_addrs + 8 + words[offs + 8]
    sizes = words[offs + 12].astype(np.int64)
    is_usual = (pc_begins == starts) & (sizes > 0)
    return starts, np.where(is_usual, sizes, 0)


def read_frame_ranges(memory: Memory, frame: Span) -> tuple[AddrArray, AddrArray]:
    """Read start and size of each function from an ``.eh_frame`` in memory.

    For programs without ``.eh_frame_hdr``, such as what GCC links with
    ``-static``. Slower than the sorted table, as records lie behind one another.
    """
    try:
        raw = memory.read(frame.start, frame.end - frame.start)
    except TargetFault:
        raw = b""
    is_usual_cie: dict[int, bool] = {}
    rows: list[tuple[int, int]] = []
    off = 0
    while off + _FDE.size <= len(raw):
        length, cie_delta, pc_begin, size = _FDE.unpack_from(raw, off)
        if length in (0, _EXTENDED_LENGTH):
            break
        if cie_delta == 0:
            is_usual_cie[off] = _has_usual_pointers(raw[off : off + 4 + length])
        elif is_usual_cie.get(off + 4 - cie_delta, False) and size > 0:
            rows.append((frame.start + off + 8 + pc_begin, size))
        off += 4 + length
    table = np.array(rows, dtype=np.int64).reshape(-1, 2)
    return table[:, 0], table[:, 1]


def _has_usual_pointers(cie: bytes) -> bool:
    """Say whether the FDEs of a CIE hold their range as two pcrel sdata4 words."""
    # length, id 0 and version come before the augmentation string
    augmentation, _, rest = cie[9:].partition(b"\0")
    if augmentation not in _AUGMENTATIONS or len(rest) < 4:
        return False
    # One byte each on this architecture: code alignment, data alignment, return address column.
    size = rest[3]
    # In all these the encoding of pointers (R) is the last byte of the augmentation data.
    return rest[3 + size : 4 + size] == bytes((_PCREL_SDATA4,))


def _read_search_table(memory: Memory, hdr: Span) -> AddrArray:
    """Read the binary search table: i64[n][2] of function start and FDE address."""
    raw = memory.read(hdr.start, hdr.end - hdr.start)
    if len(raw) >= _HDR_FORMAT.size:
        version, *encodings, _, n_fdes = _HDR_FORMAT.unpack_from(raw)
        is_whole = len(raw) >= _HDR_FORMAT.size + 8 * n_fdes
        if version == 1 and tuple(encodings) == _HDR_ENCODINGS and is_whole:
            pairs = np.frombuffer(raw, dtype="<i4", count=2 * n_fdes, offset=_HDR_FORMAT.size)
            table: AddrArray = pairs.astype(np.int64).reshape(-1, 2) + hdr.start
            return table
    return np.zeros((0, 2), dtype=np.int64)
