# SPDX-License-Identifier: Apache-2.0
"""Change where sites of the program's text lead: a displacement each, or an instruction.

The poke protocol, for a batch of sites:

1. Before the stop: every block is complete in its arena, and every site's
   baseline is in the journal.
2. In the stop: read all the batch's sites and compare each with the bytes we
   expect. A site that holds something else is somebody else's: it is left.
3. Write each with one write that stays inside one page: the kernel copies page by
   page and a killed controller leaves no half of it.
4. Read all of it back.

At every instant each site leads to its thunk or to a complete block, so a
controller that dies anywhere leaves a correct program. The length of an instruction
never changes (design rule 2), so no thread can stand inside one. Where only the
displacement changes, threads asleep in the kernel need not be stopped for bytes
that share a cache line: such a write was never seen torn. Bytes that cross a line,
and opcodes, are written only while every thread is stopped: what a CPU makes of an
opcode that changes beside it nobody promises.

``poke_batch`` leaves what is not as expected and does the rest; ``poke_all`` does all
or nothing, for changes that belong together.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Protocol

from optpoline.errors import ProcessGone, SiteChanged, TargetFault
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.x86.assembler import CALL32_OPCODE, JMP32_OPCODE
from optpoline.x86.plain_branches import decode_plain_branch

__all__ = [
    "Poke",
    "PokeResult",
    "Text",
    "crosses_line",
    "direct_opcodes",
    "find_entered",
    "is_same_but_disp",
    "leads_into",
    "needs_all_stopped",
    "poke_all",
    "poke_batch",
    "read_entries",
    "read_whole",
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
    """One displacement, or opcode and displacement, to change.

    Attributes:
        entry: The site, from the journal.
        expected: Bytes that must be there before: ``entry.changed_size`` of them.
        new: Bytes to write, as many.
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
    """Tell whether what a change writes lies in two cache lines."""
    first = entry.changed_addr // CACHE_LINE_SIZE
    return first != (entry.changed_addr + entry.changed_size - 1) // CACHE_LINE_SIZE


def needs_all_stopped(entry: JournalEntry) -> bool:
    """Tell whether a site may only be changed while every thread is stopped."""
    return entry.opcode_size > 0 or crosses_line(entry)


def find_entered(entries: Sequence[JournalEntry], pc: Addr) -> JournalEntry | None:
    """Return the site that a program counter is within, behind its first byte, or None.

    Args:
        entries: Sites by address; none reaches into another.
        pc: The program counter.
    """
    at = bisect_left(entries, pc, key=lambda entry: entry.addr) - 1
    return entries[at] if at >= 0 and pc < entries[at].end else None


def is_same_but_disp(entry: JournalEntry, code: bytes) -> bool:
    """Tell whether bytes found at a site are one of its forms, wherever that leads."""
    if len(code) != len(entry.code):
        return False
    changed = entry.changed_of(code)
    if entry.with_changed(changed) != code:
        return False
    opcode = changed[: entry.opcode_size]
    return not opcode or code == entry.code or opcode in direct_opcodes(entry)


def direct_opcodes(entry: JournalEntry) -> tuple[bytes, ...]:
    """Return what may stand where a change writes an opcode: direct calls, jumps, or both.

    In the place of an indirect call nothing but a call is right, and a jump in that of a jump.
    """
    plain = decode_plain_branch(entry.code)
    return (CALL32_OPCODE, JMP32_OPCODE) if plain is None else (plain.direct_opcode,)


def leads_into(entry: JournalEntry, code: bytes, start: int, end: int) -> bool:
    """Tell whether a site's displacement leads into a range, whatever its opcode is now.

    A breakpoint of somebody else over a patched site hides where it leads, no more.
    """
    if len(code) != len(entry.code) or (entry.opcode_size and code == entry.code):
        return False
    disp = int.from_bytes(code[entry.disp_off : entry.disp_off + 4], "little", signed=True)
    return start <= entry.end + disp < end


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


def read_whole(text: Text, entries: Sequence[JournalEntry]) -> dict[Addr, bytes]:
    """Return the instruction bytes of many sites, all of which are there.

    Raises:
        TargetFault: if one cannot be read: its module was unloaded.
    """
    found = read_entries(text, entries)
    for entry in entries:
        if not found[entry.addr]:
            raise TargetFault(entry.addr, len(entry.code), "read")
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

    Target state: its running threads are stopped; all threads are where a site of the
    batch needs it (``needs_all_stopped``).

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
        if now == poke.entry.with_changed(poke.new):
            done.append(poke)
        elif now != poke.entry.with_changed(poke.expected):
            (reloaded if now == poke.entry.code else foreign).append(poke)
        else:
            # Step 3: one write, inside one page.
            text.write(poke.entry.changed_addr, poke.new)
            done.append(poke)
    # Step 4: read back.
    _check_written(text, done)
    return PokeResult(done=tuple(done), foreign=tuple(foreign), reloaded=tuple(reloaded))


def poke_all(text: Text, pokes: Sequence[Poke]) -> None:
    """Do steps 2 to 4 for all pokes, in their order, or change nothing.

    Target state: every thread is stopped.
    On error: every site holds what it held before; only if the program's memory is gone
    half-way, what was not reached by then does.

    Raises:
        SiteChanged: if a site does not hold what is expected, or does not read back.
        TargetFault: if a site cannot be read or written.
        ProcessGone: if the program is.
    """
    # Step 2: look before you write.
    found = read_entries(text, [poke.entry for poke in pokes])
    for poke in pokes:
        wanted = poke.entry.with_changed(poke.expected)
        if found[poke.entry.addr] != wanted:
            raise SiteChanged(poke.entry.addr, wanted, found[poke.entry.addr])
    begun: list[Poke] = []
    try:
        for poke in pokes:
            begun.append(poke)
            # Step 3: one write, inside one page.
            text.write(poke.entry.changed_addr, poke.new)
        # Step 4: read back.
        _check_written(text, pokes)
    except BaseException:
        for poke in reversed(begun):
            # What cannot be written now was not written before either.
            with suppress(TargetFault, ProcessGone):
                text.write(poke.entry.changed_addr, poke.expected)
        raise


def _check_written(text: Text, pokes: Sequence[Poke]) -> None:
    """Read sites back.

    Raises:
        SiteChanged: if one does not hold what was written.
    """
    found = read_entries(text, [poke.entry for poke in pokes])
    for poke in pokes:
        wanted = poke.entry.with_changed(poke.new)
        if found[poke.entry.addr] != wanted:
            raise SiteChanged(poke.entry.addr, wanted, found[poke.entry.addr])
