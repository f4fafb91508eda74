# SPDX-License-Identifier: Apache-2.0
"""Change where sites of the program's text lead: four displacement bytes each.

The poke protocol, for a batch of sites:

1. Before the stop: every block is complete in its arena, and every site's
   baseline is in the journal.
2. In the stop: read all the batch's sites and compare each with the bytes we
   expect. A site that holds something else is somebody else's: it is left.
3. Write each displacement with one write that stays inside one page: the
   kernel copies page by page and a killed controller leaves no half of it.
4. Read all of it back.

At every instant each site leads to its thunk or to a complete block, so a
controller that dies anywhere leaves a correct program. The opcode and the
length of an instruction never change (design rule 2), so no thread can stand
inside one, and threads asleep in the kernel need not be stopped for bytes that
share a cache line: such a write was never seen torn. Bytes that cross a line
are written only while every thread is stopped.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from optpoline.errors import SiteChanged, TargetFault
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry

__all__ = [
    "Poke",
    "PokeResult",
    "Text",
    "crosses_line",
    "is_same_but_disp",
    "leads_into",
    "poke_batch",
    "read_entries",
]

CACHE_LINE_SIZE = 64
_SPAN_GAP_SIZE = 4096
"""Sites closer than this are read with one call; copying a page is cheaper
than a second system call."""


class Text(Protocol):
    """The program's text."""

    def read(self, addr: int, size: int) -> bytes:
        """Read bytes."""

    def write(self, addr: int, data: bytes) -> None:
        """Write bytes with one call."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Poke:
    """One displacement to change.

    Attributes:
        entry: The site, from the journal.
        expected: Displacement bytes that must be there before.
        new: Displacement bytes to write.
    """

    entry: JournalEntry
    expected: bytes
    new: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PokeResult:
    """What became of a batch.

    Attributes:
        done: Pokes written (or found written already).
        foreign: Pokes whose site held other bytes; left as they are.
        reloaded: Pokes whose site held its baseline though it should not: its module
            was unloaded and loaded again. Left as they are.
    """

    done: tuple[Poke, ...]
    foreign: tuple[Poke, ...]
    reloaded: tuple[Poke, ...] = ()


def crosses_line(entry: JournalEntry) -> bool:
    """Tell whether a displacement lies in two cache lines."""
    first = entry.disp_addr // CACHE_LINE_SIZE
    return first != (entry.disp_addr + 3) // CACHE_LINE_SIZE


def is_same_but_disp(entry: JournalEntry, code: bytes) -> bool:
    """Tell whether bytes found at a site differ from its baseline in the displacement only."""
    return len(code) == len(entry.code) and _with_disp(entry, _disp_of(entry, code)) == code


def leads_into(entry: JournalEntry, code: bytes, start: int, end: int) -> bool:
    """Tell whether a site's displacement leads into a range, whatever its opcode is now.

    A breakpoint of somebody else over a patched site hides where it leads, no more.
    """
    if len(code) != len(entry.code):
        return False
    disp = int.from_bytes(_disp_of(entry, code), "little", signed=True)
    return start <= entry.end + disp < end


def _disp_of(entry: JournalEntry, code: bytes) -> bytes:
    """Return the displacement in bytes found at a site."""
    return code[entry.disp_off : entry.disp_off + 4]


def read_entries(text: Text, entries: Sequence[JournalEntry]) -> dict[Addr, bytes]:
    """Return the instruction bytes of many sites, read with few calls.

    A site whose module is gone (dlclose) has none.
    """
    found: dict[Addr, bytes] = {}
    span: list[JournalEntry] = []
    for entry in sorted(entries, key=lambda entry: entry.addr):
        if span and entry.addr - span[-1].addr > _SPAN_GAP_SIZE:
            _read_span(text, span, found)
            span = []
        span.append(entry)
    if span:
        _read_span(text, span, found)
    return found


def _read_span(text: Text, span: Sequence[JournalEntry], found: dict[Addr, bytes]) -> None:
    """Read neighbouring sites with one call, or one by one where a page is gone."""
    start = span[0].addr
    try:
        data = text.read(start, span[-1].end - start)
    except TargetFault:
        if len(span) == 1:
            found[start] = b""
            return
        # A site must not count as changed because its neighbour was unmapped.
        for entry in span:
            _read_span(text, (entry,), found)
        return
    for entry in span:
        found[entry.addr] = data[entry.addr - start : entry.end - start]


def poke_batch(text: Text, pokes: Sequence[Poke]) -> PokeResult:
    """Do steps 2 to 4 of the poke protocol.

    Target state: its running threads are stopped; all threads are where a
    displacement of the batch crosses a cache line.

    Raises:
        SiteChanged: if a site does not read back as written; earlier pokes of
            the batch stay, each whole.
    """
    entries = [poke.entry for poke in pokes]
    # Step 2: look before you write.
    found = read_entries(text, entries)
    done: list[Poke] = []
    foreign: list[Poke] = []
    reloaded: list[Poke] = []
    for poke in pokes:
        now = found[poke.entry.addr]
        if now == _with_disp(poke.entry, poke.new):
            done.append(poke)
        elif now != _with_disp(poke.entry, poke.expected):
            (reloaded if now == poke.entry.code else foreign).append(poke)
        else:
            # Step 3: one write, inside one page.
            text.write(poke.entry.disp_addr, poke.new)
            done.append(poke)
    # Step 4: read back.
    found = read_entries(text, [poke.entry for poke in done])
    for poke in done:
        wanted = _with_disp(poke.entry, poke.new)
        if found[poke.entry.addr] != wanted:
            raise SiteChanged(poke.entry.addr, wanted, found[poke.entry.addr])
    return PokeResult(done=tuple(done), foreign=tuple(foreign), reloaded=tuple(reloaded))


def _with_disp(entry: JournalEntry, disp: bytes) -> bytes:
    """Return the whole instruction with another displacement."""
    return entry.code[: entry.disp_off] + disp + entry.code[entry.disp_off + len(disp) :]
