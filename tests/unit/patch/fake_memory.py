# SPDX-License-Identifier: Apache-2.0
"""Memory with synthetic stacks, frames and contexts in it."""

from __future__ import annotations

import struct
from collections.abc import Iterable

from optpoline.errors import TargetFault
from optpoline.model import Addr, Mapping
from optpoline.patch.ranges import AddressRanges

__all__ = [
    "ALT_STACK",
    "END",
    "INSIDE",
    "PAGE",
    "RANGES",
    "SEGMENTS",
    "STACK",
    "START",
    "TEXT_PC",
    "FakeMemory",
]

PAGE = 4096
START, END = Addr(0x7F00_1000_0000), Addr(0x7F00_1040_0000)
INSIDE = START + 0x123
RANGES = AddressRanges([(START, END)])
TEXT_PC = Addr(0x40_1000)
SEGMENTS = 0x002B_0000_0000_0033
STACK = 0x7FFC_0000_0000
ALT_STACK = 0x7F20_0000_0000


class FakeMemory:
    """Ranges of zeroed memory with words in them."""

    def __init__(self) -> None:
        """Start with nothing mapped."""
        self.parts: dict[int, bytearray] = {}
        self.perms: dict[int, str] = {}
        self.paths: dict[int, str] = {}
        self.ends: dict[int, int] = {}
        self.holes: set[int] = set()
        self.resident: list[tuple[int, int]] | None = None
        """What exists of it; None: all."""
        self.reads: list[tuple[int, int]] = []
        """(address, size) of each."""

    def map(self, start: int, size: int, perms: str = "rw-p") -> None:
        """Map zeroed memory."""
        self.parts[start] = bytearray(size)
        self.perms[start] = perms

    def map_nothing(self, start: int, size: int, path: str = "") -> None:
        """Map memory that is zero, more than there is room for."""
        self.map(start, 0)
        self.ends[start], self.paths[start] = start + size, path

    def find_resident(self, first: int, end: int) -> Iterable[tuple[int, int]]:
        """Return what exists in a range."""
        parts = [(first, end)] if self.resident is None else self.resident
        cut = [(max(first, start), min(end, last)) for start, last in parts]
        return [one for one in cut if one[0] < one[1]]

    @property
    def maps(self) -> list[Mapping]:
        """All mappings in address order."""
        return [
            Mapping(
                start=Addr(start),
                end=Addr(self.ends.get(start, start + len(self.parts[start]))),
                perms=self.perms[start],
                offset=0,
                device="00:00",
                inode=0,
                path=self.paths.get(start, ""),
            )
            for start in sorted(self.parts)
        ]

    def put(self, addr: int, *words: int) -> None:
        """Store words."""
        for i, word in enumerate(words):
            at = addr + 8 * i
            start = max(start for start in self.parts if start <= at)
            struct.pack_into("<Q", self.parts[start], at - start, word)

    def put_frame(self, addr: int, *, sp: int, pc: int, segments: int = SEGMENTS) -> None:
        """Store the end of a sigcontext: rsp, rip, eflags, segments."""
        self.put(addr, sp, pc, 0x246, segments)

    def read(self, addr: int, size: int) -> bytes:
        """Read across neighbouring mappings, or fault."""
        if any(addr < hole + PAGE and hole < addr + size for hole in self.holes):
            raise TargetFault(addr, size)
        self.reads.append((addr, size))
        data = b""
        while len(data) < size:
            at = addr + len(data)
            if any(start <= at < end for start, end in self.ends.items()):
                data += bytes(size - len(data))
                break
            part = next((s for s, d in self.parts.items() if s <= at < s + len(d)), None)
            if part is None:
                raise TargetFault(addr, size)
            data += self.parts[part][at - part :][: size - len(data)]
        return bytes(data)
