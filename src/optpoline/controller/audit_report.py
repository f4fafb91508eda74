# SPDX-License-Identifier: Apache-2.0
"""What an audit of a process found: records only.

A *fault* is something of ours that is not as it must be. A *foreign change* is text
that differs from the program's files without our doing: a breakpoint, a uprobe, a text
relocation; the audit tells of it and takes no offence.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["AuditReport", "Fault", "FaultKind", "ForeignChange", "ForeignKind"]


class FaultKind(Enum):
    """Which promise is broken."""

    SITE = "site"
    """A site holds neither its baseline nor a branch to a live block of its own."""
    BLOCK = "block"
    """A block's bytes are not those that were written, or do what no block may."""
    HEAD = "head"
    """A block's head is neither as encoded nor a redirection to where it may lead."""
    LITERAL = "literal"
    """A block is as written, but a literal that it compares with is not."""
    TABLE = "table"
    """The block table contradicts itself or the journal."""
    FREE_MEMORY = "free_memory"
    """Code memory of no block holds something other than int3 or zeros."""
    RIGHTS = "rights"
    """A part of an arena can be written or executed that must not be."""
    ARENA = "arena"
    """An arena is damaged, or not mapped as a whole."""
    TEXT = "text"
    """Text leads into an arena, and no journal tells of it."""
    SETTING = "setting"
    """A static key or call was left half changed: a controller was killed then."""


class ForeignKind(Enum):
    """What a foreign change looks like."""

    INT3 = "int3"
    """One byte became int3: a debugger's breakpoint, or a uprobe."""
    RELOCATION = "relocation"
    """The dynamic linker relocates this module's text."""
    SITE = "site"
    """Another patcher's bytes lie over a site that we had changed."""
    RIGHTS = "rights"
    """Code of a module with sites can be written by the program: we never change rights."""
    OTHER = "other"


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Something of ours that is wrong.

    Attributes:
        kind: Which promise is broken.
        address: Where: the first byte of the site, block, entry or part.
        sentence: What is wrong, for people.
    """

    kind: FaultKind
    address: int
    sentence: str


@dataclass(frozen=True, slots=True, kw_only=True)
class ForeignChange:
    """Text that is not as in its file, without our doing.

    Attributes:
        kind: What it looks like.
        address: First byte that differs.
        size: Bytes from there to the last one that differs.
        module: Path of the file that is mapped there, as the program names it.
    """

    kind: ForeignKind
    address: int
    size: int
    module: str


@dataclass(frozen=True, slots=True, kw_only=True)
class AuditReport:
    """All that one audit found.

    Attributes:
        pid: The process.
        arenas: Number of arenas mapped in it.
        controller_pid: Controller that made them, as it recorded itself; 0 if none.
        controller_alive: Whether that controller still runs.
        promoted: Sites that lead to a live block, a counting one included.
        baseline: Journalled sites that hold their baseline.
        gone: Journalled sites whose module was unloaded or replaced.
        blocks: Live blocks, each looked at.
        retired: Retired blocks, likewise.
        modules: Modules whose text was compared with their file.
        faults: What is wrong, by address.
        foreign_changes: What others changed, by address.
        notes: Sentences worth telling.
        settings: Static keys and calls that are not as they begin, such as "trace=on".
    """

    pid: int
    arenas: int
    controller_pid: int
    controller_alive: bool
    promoted: int
    baseline: int
    gone: int
    blocks: int
    retired: int
    modules: int
    faults: tuple[Fault, ...]
    foreign_changes: tuple[ForeignChange, ...]
    notes: tuple[str, ...]
    settings: tuple[str, ...] = ()

    @property
    def is_sound(self) -> bool:
        """Whether nothing of ours is wrong."""
        return not self.faults
