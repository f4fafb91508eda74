# SPDX-License-Identifier: Apache-2.0
"""Program text as bytes: read from a process, or from a file as if it were mapped.

The baseline is what memory holds. Where memory has a breakpoint (``int3``)
that the file has not, the file's byte is what the program means; it is used to
decode, and never written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from optpoline.discover.elf import Segment
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.x86.decode import TextArray

__all__ = ["FileMemory", "SegmentBytes", "Text", "make_text"]

_INT3 = 0xCC


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentBytes:
    """The bytes that a file holds for one segment.

    Attributes:
        segment: Which.
        data: ``segment.file_size`` bytes, fewer if the file is cut short.
    """

    segment: Segment
    data: bytes


class FileMemory:
    """An ELF file's segments at the addresses it asks for.

    Args:
        segments: What the file holds.
    """

    def __init__(self, segments: Sequence[SegmentBytes]) -> None:
        """Keep the segments."""
        self._segments = tuple(segments)

    def read(self, addr: int, size: int) -> bytes:
        """Read from the segment that holds the whole range.

        Raises:
            TargetFault: if there is none.
        """
        for held in self._segments:
            off = addr - held.segment.addr
            if off >= 0 and off + size <= len(held.data):
                return held.data[off : off + size]
        raise TargetFault(addr, size, "read")


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A run of executable memory.

    Attributes:
        addr: Its first address.
        baseline: Its bytes as they are in memory.
        code: The same with breakpoints taken out, for decoding.
        array: ``code`` for numpy.
    """

    addr: Addr
    baseline: bytes
    code: bytes
    array: TextArray = field(repr=False)

    @property
    def end(self) -> Addr:
        """Address after it."""
        return Addr(self.addr + len(self.code))

    def __contains__(self, addr: int) -> bool:
        """Say whether an address lies in it."""
        return self.addr <= addr < self.end

    def code_at(self, addr: int, size: int) -> bytes:
        """Return up to ``size`` bytes of code from an address in it."""
        off = addr - self.addr
        return self.code[off : off + size]


def make_text(addr: Addr, baseline: bytes, files: Sequence[SegmentBytes], load_bias: int) -> Text:
    """Make a text from memory, taking out breakpoints with the help of the file.

    Args:
        addr: Its first address.
        baseline: Its bytes in memory.
        files: What the module's file holds, nothing if it cannot be read.
        load_bias: Runtime address minus address in the file.
    """
    array = np.frombuffer(baseline, dtype=np.uint8)
    traps = np.flatnonzero(array == _INT3)
    code = baseline
    for held in files:
        offs = traps + (addr - load_bias - held.segment.addr)
        is_held = (offs >= 0) & (offs < len(held.data))
        here, original = traps[is_held], np.frombuffer(held.data, dtype=np.uint8)
        original = original[offs[is_held]]
        if (original != _INT3).any():
            array = array.copy()
            array[here] = original
            code = array.tobytes()
    return Text(addr=addr, baseline=baseline, code=code, array=array)
