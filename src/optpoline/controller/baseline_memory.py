# SPDX-License-Identifier: Apache-2.0
"""Read a program as it was before a controller changed its text, while one may be at work.

A linked site branches into an arena, so whoever looks for branches to thunks does not see
it. The journals of the arenas that are mapped say what its displacement was. Everything is
read, nothing is stopped or written.
"""

from __future__ import annotations

from collections.abc import Iterator

from optpoline.controller.audit_scene import read_table
from optpoline.controller.left_arenas import LeftArena, find_arenas
from optpoline.controller.summary import SiteState
from optpoline.errors import TargetFault
from optpoline.model import Addr, Mapping
from optpoline.patch.layout import BlockEntry, BlockKind, JournalEntry
from optpoline.patch.text import direct_opcodes, is_same_but_disp, leads_into
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps
from optpoline.x86.assembler import JMP32_OPCODE, JMP32_SIZE

__all__ = ["BaselineMemory"]

_INT3 = b"\xcc"
_MAX_HOPS = 4
"""Heads followed from a site: its home block, the active one, and one that samples it."""


class BaselineMemory:
    """A program's memory, with the baseline of each linked site in its place.

    Args:
        memory: Its memory as it is.
    """

    def __init__(self, memory: RemoteMemory) -> None:
        """Read its memory map; journals are read when text is."""
        self._memory = memory
        self._maps: tuple[Mapping, ...] = read_maps(memory.pid)
        self._linked: dict[Addr, Addr] = {}
        self.arenas: dict[Addr, LeftArena] = {}
        """Arenas seen so far, by address."""

    def read(self, addr: int, size: int) -> bytes:
        """Return exactly size bytes, or raise ``TargetFault``."""
        data = self._memory.read(addr, size)
        is_code = any(
            m.is_executable and m.start < addr + size and addr < m.end for m in self._maps
        )
        if not is_code:
            return data
        # After the text: a site is journalled before it is changed. The arenas seen before
        # stay known, should one be let go meanwhile.
        self._maps = read_maps(self._memory.pid)
        self.arenas |= {arena.start: arena for arena in find_arenas(self._memory, self._maps)}
        text = bytearray(data)
        for arena in self.arenas.values():
            for entry in arena.entries:
                if addr <= entry.addr and entry.end <= addr + size:
                    self._put_back(entry, arena, text, entry.addr - addr)
        return bytes(text)

    def _put_back(self, entry: JournalEntry, arena: LeftArena, text: bytearray, off: int) -> None:
        """Put a site's displacement into text that was read, if the site is linked."""
        code = bytes(text[off : off + len(entry.code)])
        # A breakpoint over it hides its opcode; it is linked all the same.
        is_hidden = code[:1] == _INT3
        bare = _without_breakpoint(entry, code) if is_hidden else code
        if is_same_but_disp(entry, bare) and leads_into(entry, bare, arena.start, arena.end):
            disp = int.from_bytes(bare[entry.disp_off : entry.disp_off + 4], "little", signed=True)
            self._linked[entry.addr] = Addr(entry.end + disp)
            text[off : off + len(code)] = (_INT3 if is_hidden else entry.code[:1]) + entry.code[1:]

    def read_states(self) -> dict[Addr, SiteState]:
        """Return where the sites that were found linked lead now, by their addresses.

        LEARNING in a counting block, BASELINE through blocks to the thunk, else PROMOTED.
        """
        blocks: dict[Addr, BlockEntry] = {}
        for arena in self.arenas.values():
            blocks |= {block.addr: block for block in self._read_blocks(arena)}
        return {site: self._state_of(home, blocks) for site, home in self._linked.items()}

    def _read_blocks(self, arena: LeftArena) -> Iterator[BlockEntry]:
        """Yield the blocks of an arena; none if it is gone."""
        if arena.header is None:
            return
        try:
            slots = read_table(self._memory, arena, arena.header)
        except TargetFault:
            return
        yield from (slot.entry for slot in slots if slot.entry is not None)

    def _state_of(self, home: Addr, blocks: dict[Addr, BlockEntry]) -> SiteState:
        """Follow redirected heads from the block that a site leads to."""
        kinds: set[BlockKind] = set()
        at: Addr | None = home
        for _ in range(_MAX_HOPS):
            block = blocks.get(at) if at is not None else None
            if block is None:
                break
            if block.kind is BlockKind.THUNK:
                return SiteState.BASELINE
            kinds.add(block.kind)
            at = self._redirection_of(block)
        # What is promoted is sampled by way of a counting block now and then.
        if at is not None and kinds and at not in blocks:
            return SiteState.BASELINE
        return SiteState.LEARNING if kinds == {BlockKind.COUNTING} else SiteState.PROMOTED

    def _redirection_of(self, block: BlockEntry) -> Addr | None:
        """Return where a block's head has been made to jump; None if it does its own work."""
        try:
            head = self._memory.read(block.addr, len(block.head))
        except TargetFault:
            return None
        if head == block.head or head[:1] != JMP32_OPCODE:
            return None
        disp = int.from_bytes(head[1:JMP32_SIZE], "little", signed=True)
        return Addr(block.addr + JMP32_SIZE + disp)

    def describe_unreadable(self) -> tuple[str, ...]:
        """Return a sentence for each arena whose journal cannot be read."""
        return tuple(
            f"the arena at {arena.start:#x} is damaged, or of another version of optpoline: "
            "sites that lead there are missing here"
            for arena in self.arenas.values()
            if arena.header is None and arena.has_code
        )


def _without_breakpoint(entry: JournalEntry, code: bytes) -> bytes:
    """Return a linked site's bytes as they would be without the breakpoint over the first."""
    if entry.opcode_size and entry.changed_addr == entry.addr:
        return direct_opcodes(entry)[0] + code[1:]
    return entry.code[:1] + code[1:]
