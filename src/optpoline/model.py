# SPDX-License-Identifier: Apache-2.0
"""The nouns of optpoline as frozen records; no I/O, no architecture.

A *site* is one indirect branch instruction of the program, written as a direct
branch to a *thunk* that does the indirect branch safely; or a *plain* one, an indirect
branch itself that the program's source declares, and that has room for a direct one.
Policy code turns
counted targets into a *branch tree* (``TreeNode``); the architecture package
turns a ``BlockPlan`` into bytes. Nothing here knows an opcode.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from typing import NewType

__all__ = [
    "CELL_SIZE",
    "SLOT_CLAIMED",
    "Addr",
    "BlockPlan",
    "Count",
    "CounterRows",
    "Guard",
    "Mapping",
    "Miss",
    "Module",
    "OpenSlot",
    "OperandLoad",
    "Refusal",
    "RseqAbi",
    "Site",
    "SiteKind",
    "Split",
    "Table",
    "Thunk",
    "ThunkFlavour",
    "TraceRing",
    "TreeNode",
    "tree_targets",
]

Addr = NewType("Addr", int)
"""An absolute virtual address in the target."""


class SiteKind(Enum):
    """What the instruction at a site does."""

    CALL = "call"
    JUMP = "jump"
    COND_JUMP = "cond_jump"


class ThunkFlavour(Enum):
    """Whose thunk it is, by symbol or by body."""

    GCC = "gcc"
    CLANG = "clang"
    EXTERN = "extern"
    """Named like a thunk, with a body of the program's own (``thunk-extern``)."""
    PLAIN = "plain"
    """None in the program: a plain site's blocks end at an indirect jump in their arena."""


class Refusal(Enum):
    """Why a site is reported but never promoted; the value is shown to users."""

    PAGE_CROSSING = "its displacement crosses a page"
    FLAGS_LIVE = "an address it may jump to reads the flags"
    FLAGS_UNKNOWN = "the function around it is not known, so flags may be live"
    FOREIGN_BYTES = "another patcher's bytes are in it"
    UNKNOWN_OPERAND = "its thunk does not take the target in a register"
    CRITICAL_SECTION = "it is inside a restartable sequence of the program's own"
    EXCLUDED = "the program's source says that it shall stay as it is"
    DAMAGED_NOTES = "its module's notes, which may exclude it, are damaged or too new"


@dataclass(frozen=True, slots=True, kw_only=True)
class Mapping:
    """One line of ``/proc/PID/maps``.

    Attributes:
        start: First address.
        end: Address after the last.
        perms: Four characters such as ``r-xp``.
        offset: File offset in bytes.
        device: ``major:minor`` in hex as printed.
        inode: Inode number, 0 for anonymous memory.
        path: Path or ``[name]`` as printed, "" for anonymous memory; " (deleted)" kept.
    """

    start: Addr
    end: Addr
    perms: str
    offset: int
    device: str
    inode: int
    path: str

    @property
    def size(self) -> int:
        """Size in bytes."""
        return self.end - self.start

    @property
    def is_executable(self) -> bool:
        """Whether instructions can be fetched from it."""
        return self.perms[2] == "x"

    @property
    def is_writable(self) -> bool:
        """Whether the program can write to it."""
        return self.perms[1] == "w"


@dataclass(frozen=True, slots=True, kw_only=True)
class Module:
    """One ELF file mapped into the target, or an ELF file on disk (load_bias 0).

    Attributes:
        path: As the target names it (``/proc/PID/maps``), without " (deleted)".
        load_bias: Runtime address minus ELF p_vaddr.
        start: First address of its lowest mapping.
        end: Address after its highest mapping.
        mappings: Its mappings in address order.
        is_main: Whether it is the executable.
        build_id: Hex GNU build id, or None.
    """

    path: str
    load_bias: int
    start: Addr
    end: Addr
    mappings: tuple[Mapping, ...]
    is_main: bool
    build_id: str | None

    @property
    def name(self) -> str:
        """Last component of the path."""
        return self.path.rsplit("/", 1)[-1]


@dataclass(frozen=True, slots=True, kw_only=True)
class Thunk:
    """Code that does one indirect branch without speculation.

    Attributes:
        addr: Its first instruction; 0 for PLAIN, where each site gets one when it is learned.
        operand: Name of the register that holds the target, such as "rax"; of a plain site whose
            target is in memory, the register that its blocks load it into.
        flavour: Whose it is.
        symbol: Its symbol, or None where only the body told.
    """

    addr: Addr
    operand: str
    flavour: ThunkFlavour
    symbol: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Table:
    """A table of dynamic calls, as the program's source declares it: sites share it.

    One name and one type are one table, whichever modules of a process its sites are in.

    Attributes:
        name: What it is called.
        type: Result and parameters of what is called through it, as written, or None.
    """

    name: str
    type: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class OperandLoad:
    """The instruction that loads an operand which is in memory into a register.

    Attributes:
        code: Its bytes; where it is relative to where it is, its last four are 0.
        data_addr: What it reads, if it is relative to where it is, else None.
    """

    code: bytes
    data_addr: Addr | None = None

    @property
    def size(self) -> int:
        """Its length in bytes."""
        return len(self.code)


@dataclass(frozen=True, slots=True, kw_only=True)
class Site:
    """One site: a direct branch to a thunk, or a plain indirect branch as long as one.

    Attributes:
        addr: Its first byte, prefixes included.
        code: Its bytes as read from memory when it was found (the baseline).
        kind: Call, jump or conditional jump.
        disp_addr: Address of its 32-bit displacement, the only bytes ever changed; at a plain
            site where one is while it leads to a block, and the opcode before it changes too.
        thunk: The thunk it branches to in the baseline.
        module: Path of the module it is in.
        function: Name of the function it is in, or None.
        function_addr: Start of that function, or None.
        refusal: Why it must not be promoted, or None.
        max_guards: Guards that its source allows at most, 0 for any number.
        is_plain: Whether the baseline is an indirect branch itself.
        table: The table of dynamic calls that its source says it is of, or None.
        load: Of a plain site whose target is in memory: what loads it into the thunk's operand, a
            register that is dead there and at each of its targets. Else None.
    """

    addr: Addr
    code: bytes
    kind: SiteKind
    disp_addr: Addr
    thunk: Thunk
    module: str
    function: str | None
    function_addr: Addr | None
    refusal: Refusal | None = None
    max_guards: int = 0
    is_plain: bool = False
    table: Table | None = None
    load: OperandLoad | None = None

    @property
    def is_undeclared_plain(self) -> bool:
        """Whether it is promoted on request only (``Config.promote_plain``)."""
        return self.is_plain and self.table is None

    @property
    def end(self) -> Addr:
        """Address after the instruction; what its displacement counts from."""
        return Addr(self.addr + len(self.code))


@dataclass(frozen=True, slots=True, kw_only=True)
class Count:
    """How often one target was taken in a window."""

    target: Addr
    hit_count: int


# --- branch trees: what a block does with its operand -----------------------


@dataclass(frozen=True, slots=True)
class Miss:
    """Leaf: none of the known targets; on to the site's own thunk."""


@dataclass(frozen=True, slots=True)
class Guard:
    """Compare with ``target`` and branch directly to it when equal.

    Attributes:
        target: The learned target.
        below: Where operands below ``target`` go (unsigned), or None if they
            go the same way as those above.
        otherwise: Where the rest goes.
        falls_below: Whether the way below is the one without a taken branch.
    """

    target: Addr
    below: TreeNode | None
    otherwise: TreeNode
    falls_below: bool = False


@dataclass(frozen=True, slots=True)
class Split:
    """Compare with ``key``: below it (unsigned) one way, the rest the other.

    Attributes:
        key: What to compare with.
        below: Where operands below ``key`` go.
        above: Where the rest goes.
        falls_below: Whether the way below is the one without a taken branch.
    """

    key: Addr
    below: TreeNode
    above: TreeNode
    falls_below: bool = False


TreeNode = Miss | Guard | Split


def tree_targets(node: TreeNode) -> Iterator[Addr]:
    """Yield each guarded target of a tree, root first.

    >>> list(tree_targets(Guard(Addr(8), None, Guard(Addr(4), None, Miss()))))
    [8, 4]
    """
    stack: list[TreeNode] = [node]
    while stack:
        match stack.pop():
            case Guard(target, below, otherwise, _):
                yield target
                stack.append(otherwise)
                if below is not None:
                    stack.append(below)
            case Split(_, below, above, _):
                stack += [above, below]
            case Miss():
                pass


# --- counters: what a learning block writes ----------------------------------

CELL_SIZE = 8
"""Bytes of a counter cell."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RseqAbi:
    """Where the threads of a program have registered their ``struct rseq``.

    Attributes:
        offset: Bytes from the thread pointer (``%fs``) to the struct, signed.
        signature: u32 that the kernel wants before every abort handler.
    """

    offset: int
    signature: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CounterRows:
    """One row of counter cells for all, and one for each CPU.

    A cell is named by its address in row 0, the *shared* row, which is counted in
    with ``lock``-prefixed instructions by who cannot use the row of its CPU. A count is the
    sum over all rows. Rows are as long as a power of two, so CPUs share no cache line::

        shared_addr                      row 0: shared
        shared_addr + (1 << row_shift)   row 1: CPU 0
        shared_addr + (2 << row_shift)   row 2: CPU 1, and so on

    Attributes:
        shared_addr: First byte of row 0.
        row_shift: Binary logarithm of the size of a row in bytes.
        n_cpus: CPUs that have a row: 0 to ``n_cpus - 1``.
        rseq: How threads register restartable sequences; None where they do not.
    """

    shared_addr: Addr
    row_shift: int
    n_cpus: int
    rseq: RseqAbi | None

    @property
    def row_size(self) -> int:
        """Bytes of one row."""
        return 1 << self.row_shift

    @property
    def size(self) -> int:
        """Bytes of all rows."""
        return (1 + self.n_cpus) << self.row_shift

    def cell_of_cpu(self, cell: Addr, cpu: int) -> Addr:
        """Return where CPU ``cpu`` has the cell that row 0 has at ``cell``."""
        return Addr(cell + ((1 + cpu) << self.row_shift))


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenSlot:
    """Two adjacent counter cells that the first unknown target to come by claims.

    In the shared row bit 63 of the count says that the slot is claimed; who reads the
    count leaves it out (``SLOT_CLAIMED``).

    Attributes:
        target_addr: u64 in counter memory, 0 while free.
        count_addr: The cell behind it, hits of that target.
    """

    target_addr: Addr
    count_addr: Addr


SLOT_CLAIMED = 1 << 63
"""Set in the count of a slot of the shared row by who claims it, before the target is stored."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TraceRing:
    """Where a block writes which target came by, one u32 for each hit.

    Attributes:
        head_addr: u64 in the shared row: entries ever written.
        entries_addr: The first of ``n_entries`` u32, in counter memory.
        n_entries: A power of two.
        ids: (target, u32 that is written for it) for each target to be traced.
    """

    head_addr: Addr
    entries_addr: Addr
    n_entries: int
    ids: tuple[tuple[Addr, int], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPlan:
    """What one block is to do; the encoder turns it into bytes.

    A promoted block counts misses only, by a plain increment: a rate, not a count. A
    learning block (one with ``rows``) counts each hit of its tree exactly, or writes it
    to a trace, and has open slots for targets nobody has seen yet. Counter cells may be
    written by the program and never decide where a branch goes. All cells are named by
    their addresses in the shared row.

    Attributes:
        operand: Register holding the target.
        tree: What to compare, in which order.
        thunk_addr: The site's own thunk, where every miss goes; where the operand is loaded, a
            thunk that begins with the same load.
        hit_count_addrs: (target, counter cell) for each target to be counted.
        miss_count_addr: Counter cell of misses that found no slot, or None. In a learning
            block the cell before it holds the last target that found none.
        open_slots: Claimable slots, tried in order on a miss of the tree.
        base: Subtracted from the operand first, and added again before the thunk, so that
            what is compared with fits immediates; None to leave the operand alone. Only
            where the operand is dead at every target of the tree.
        rows: What a learning block counts in; None for a promoted block, which has
            neither counted hits nor slots.
        is_below_stack_free: Whether the 128 bytes below the stack pointer are dead when
            the block is entered: a call has just pushed its return address.
        thunk_targets: Targets in the tree that are counted but led to the thunk: too far
            for a direct branch, or not to be guarded.
        trace: Where hits are written instead of being counted, or None.
        load: What loads the operand first, where it is in memory, else None.
    """

    operand: str
    tree: TreeNode
    thunk_addr: Addr
    hit_count_addrs: tuple[tuple[Addr, Addr], ...] = ()
    miss_count_addr: Addr | None = None
    open_slots: tuple[OpenSlot, ...] = ()
    base: Addr | None = None
    rows: CounterRows | None = None
    is_below_stack_free: bool = False
    thunk_targets: frozenset[Addr] = frozenset()
    trace: TraceRing | None = None
    load: OperandLoad | None = None

    @property
    def miss_addr(self) -> Addr:
        """Where a miss goes: the thunk, behind the load that was done already."""
        return Addr(self.thunk_addr + (0 if self.load is None else self.load.size))

    def __post_init__(self) -> None:
        """Refuse what no block does.

        Raises:
            ValueError: if something is to be counted without rows, or rows go unused.
        """
        noted = {target for target, _ in self.hit_count_addrs}
        if self.trace is not None:
            noted |= {target for target, _ in self.trace.ids}
        if self.rows is None and (noted or self.open_slots or self.trace is not None):
            raise ValueError("a block without counter rows counts nothing but misses")
        if self.rows is not None and self.miss_count_addr is None:
            raise ValueError("a block with counter rows counts misses too")
        if not self.thunk_targets <= noted:
            raise ValueError("a target that is led to the thunk has to be counted or traced")
