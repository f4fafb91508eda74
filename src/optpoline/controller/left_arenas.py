# SPDX-License-Identifier: Apache-2.0
"""Find the arenas in a process from outside: by their name in its memory map.

All that is read is the program's own memory, so it works without the files and the
privileges of the controller that made them, whether that still runs or not.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.errors import ProcessGone, TargetFault
from optpoline.model import Addr, Mapping
from optpoline.patch.layout import (
    ARENA_PATH,
    ENTRY_SIZE,
    HEADER_SIZE,
    ArenaHeader,
    JournalEntry,
)
from optpoline.process.leader import find_live_tid
from optpoline.process.memory import Memory
from optpoline.process.procfs import read_start_time

__all__ = ["LeftArena", "find_arena_files", "find_arenas", "is_controller_alive"]


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftArena:
    """An arena found in a memory map.

    Attributes:
        parts: Its mappings, in address order, without a gap.
        header: What its header says; None if it was never finished, is damaged, or is of
            another version of the format.
        history: Its journal: every entry, in the order in which they were made.
    """

    parts: tuple[Mapping, ...]
    header: ArenaHeader | None
    history: tuple[JournalEntry, ...]

    @property
    def entries(self) -> tuple[JournalEntry, ...]:
        """The last entry of each address: an earlier one is of a module that was replaced."""
        return tuple({entry.addr: entry for entry in self.history}.values())

    @property
    def start(self) -> Addr:
        """First address."""
        return self.parts[0].start

    @property
    def end(self) -> Addr:
        """Address after the last."""
        return self.parts[-1].end

    @property
    def has_code(self) -> bool:
        """Whether its code is mapped, which is done last: text may lead there from then on."""
        return any(part.is_executable for part in self.parts)


def find_arenas(memory: Memory, maps: Sequence[Mapping]) -> list[LeftArena]:
    """Return the arenas of a process, complete or not, in address order."""
    spans: list[list[Mapping]] = []
    for mapping in maps:
        # A controller maps the whole of its arenas writable: those are not its own.
        if mapping.path != ARENA_PATH or (mapping.is_writable and mapping.offset == 0):
            continue
        last = spans[-1][-1] if spans else None
        if last is not None and last.end == mapping.start and last.inode == mapping.inode:
            spans[-1].append(mapping)
        else:
            spans.append([mapping])
    return [_read_arena(memory, tuple(span)) for span in spans]


def find_arena_files(pid: int) -> tuple[int, ...]:
    """Return descriptors of arenas: open for an instant only, unless a controller died then."""
    folder = f"/proc/{find_live_tid(pid)}/fd"
    try:
        names = os.listdir(folder)
    except OSError:
        return ()  # gone, or not ours to see: then we could not undo anything either
    return tuple(int(name) for name in names if _is_arena_file(f"{folder}/{name}"))


def _is_arena_file(link: str) -> bool:
    """Tell whether a link of ``/proc/PID/fd`` leads to an arena's memfd."""
    try:
        return os.readlink(link) == ARENA_PATH
    except OSError:
        return False  # closed meanwhile


def is_controller_alive(header: ArenaHeader) -> bool:
    """Tell whether the controller that made an arena still runs."""
    try:
        return read_start_time(header.controller_pid) == header.controller_start
    except ProcessGone:
        return False


def _read_arena(memory: Memory, parts: tuple[Mapping, ...]) -> LeftArena:
    """Read header and journal; an arena that was never finished has neither."""
    nothing = LeftArena(parts=parts, header=None, history=())
    start = parts[0].start
    try:
        header = ArenaHeader.unpack(memory.read(start, HEADER_SIZE))
        if header is None:
            return nothing
        size = header.n_entries * ENTRY_SIZE
        data = memory.read(start + HEADER_SIZE, size) if size else b""
    except TargetFault:
        return nothing
    history = tuple(
        JournalEntry.unpack(data[off : off + ENTRY_SIZE]) for off in range(0, size, ENTRY_SIZE)
    )
    return LeftArena(parts=parts, header=header, history=history)
