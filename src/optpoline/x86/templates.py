# SPDX-License-Identifier: Apache-2.0
"""Encode a block once, then relocate it: for thousands of blocks that differ in addresses only.

Most blocks of a program have one of a few *shapes*: a first learning block of a call
through ``rax`` is the same wherever it is, but for where it lies, its cells and its thunk.
The first block of a shape is encoded and kept as a *template*: constant bytes, and between
them the fields that follow from addresses, each a constant plus one of a handful of sums::

    own address               descriptors of restartable sequences
    cells, thunk, loaded operand, - own
                              displacements to them; a literal that all share does not move
    cells - shared row        offsets in a row
    target, - own; target     branches to it; immediates that are compared with it
    its literal, - own

Encoding a first learning block takes 80 us, relocating it 7; of one guard 10 and 6.

Invariants:
  * A block made from a template is the block that ``encode_block`` makes, byte for byte;
    and where that refuses, so does this.
  * A shape holds all that the encoder looks at beside addresses. Blocks that it decides more
    about by the values of their targets (splits, a base) or that lead to more memory (traces)
    have none: they are encoded, as are big trees, of which hardly two are alike.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from optpoline.model import CELL_SIZE, Addr, BlockPlan, CounterRows, Guard, Miss, TreeNode
from optpoline.x86.assembler import (
    DISP32_SIZE,
    LINE_SIZE,
    RECORD_ALIGNMENT,
    BlockCode,
    Relocation,
    RelocationKind,
)
from optpoline.x86.blocks import encode_block, fits_immediate
from optpoline.x86.restartable import LiteralPool

__all__ = ["BlockDraft", "BlockTemplates"]

MAX_GUARDS = 8
"""Guards of a block that has a shape."""

MAX_TEMPLATES = 512
"""Templates kept, of one to four KiB; a program uses a few dozen."""

_OWN, _CELLS, _THUNK, _LOADED, _FIXED, _ROW, _N_SHARED_SUMS = range(7)
"""What is added to a field, as places in ``_sums``: then three sums for each target."""
_TO_TARGET, _VALUE, _TO_LITERAL, _N_TARGET_SUMS = range(4)
_UNKNOWN = -1

_HALVED = 1 << 4
"""In what decides on a node's code: a half of it lies behind the other, kept in a line."""

_WORD_SIZE = 8


class _Shape(NamedTuple):
    """All that the bytes of a block depend on beside addresses.

    Attributes:
        operand: Register that holds the target.
        tree: For each node of the tree, root first, what decides on its code.
        cells: Where the cells lie, from that of the misses; by target of the tree those of
            hits, None where none are counted, then those of slots, one after the other.
        has_misses: Whether misses are counted.
        to_thunk: Which targets are led to the thunk.
        rows: What is counted in.
        is_below_stack_free: As in the plan.
        load: Bytes of what loads the operand.
        addr_rest: Where in a line the block starts, as far as padding may depend on it.
    """

    operand: str
    tree: tuple[int, ...]
    cells: tuple[int | None, ...]
    has_misses: bool
    to_thunk: tuple[bool, ...]
    rows: CounterRows | None
    is_below_stack_free: bool
    load: bytes
    addr_rest: int

    def has_layout_at(self, addr: Addr, size: int) -> bool:
        """Tell whether a block of this shape, of ``size`` bytes, is laid out alike at ``addr``.

        One without records that lies in one line has no padding.
        """
        if self.addr_rest == _addr_rest(self.tree, self.rows, addr):
            return True
        return self.rows is None and max(self.addr_rest, addr % LINE_SIZE) + size <= LINE_SIZE


@dataclass(frozen=True, slots=True)
class _Template:
    """The bytes of all blocks of one shape.

    Attributes:
        layout: Constant bytes and fields in turn, constant bytes last.
        constants: The constant bytes.
        fields: Of each field what is constant, and which sum is added.
        has_literal: By target, whether the block reads its literal.
        text_size: Bytes that are instructions.
    """

    layout: struct.Struct
    constants: tuple[bytes, ...]
    fields: tuple[tuple[int, int], ...]
    has_literal: tuple[bool, ...]
    text_size: int

    def relocate(self, sums: Sequence[int]) -> BlockCode:
        """Return the block.

        Raises:
            struct.error: if an address is out of reach.
        """
        parts: list[bytes | int] = [b""] * (2 * len(self.fields) + 1)
        parts[::2] = self.constants
        parts[1::2] = [constant + sums[which] for constant, which in self.fields]
        return BlockCode(code=self.layout.pack(*parts), text_size=self.text_size)


@dataclass(frozen=True, slots=True)
class BlockDraft:
    """A block whose place is still to be found.

    Attributes:
        size: Its bytes where it was drafted for. If that is the start of a line it has as many
            at each, and wherever it fits a line, without records.
        encode: Returns it for an address. Raises ``EncodeRangeError`` as ``encode_block``.
    """

    size: int
    encode: Callable[[Addr], BlockCode]


class BlockTemplates:
    """The templates of one arena.

    Args:
        literals: Its literals; they stay where they are.
    """

    def __init__(self, literals: LiteralPool) -> None:
        """Begin with none."""
        self._literals = literals
        self._templates: dict[_Shape, _Template] = {}

    def encode(self, plan: BlockPlan, addr: Addr) -> BlockCode:
        """Return what ``encode_block`` returns.

        Args:
            plan: What the block is to do.
            addr: Where it will be, a multiple of ``HEAD_SIZE``.

        Raises:
            EncodeRangeError: as ``encode_block``.
        """
        return self.draft(plan, addr).encode(addr)

    def draft(self, plan: BlockPlan, addr: Addr) -> BlockDraft:
        """Return a block of known size, to be put where there is room.

        Args:
            plan: What the block is to do.
            addr: Where it may be: the start of a line if others come into question.

        Raises:
            EncodeRangeError: as ``encode_block``; not of each block that is out of reach.
        """
        targets: list[Addr] = []
        tree: list[int] = []
        if plan.base is not None or plan.trace is not None or not _walk(plan.tree, targets, tree):
            return self._draft_of(plan, addr, encode_block(plan, addr, self._literals))
        shape = _shape_of(plan, addr, targets, tree)
        template = self._templates.get(shape)
        if template is None:
            return self._draft_of(plan, addr, self._encode_first(shape, plan, addr, targets))
        encode = partial(self._encode_alike, shape, template, plan, targets)
        return BlockDraft(size=template.layout.size, encode=encode)

    def _draft_of(self, plan: BlockPlan, addr: Addr, code: BlockCode) -> BlockDraft:
        """Return the draft of a block that was encoded for one address."""

        def encode(at: Addr) -> BlockCode:
            return code if at == addr else encode_block(plan, at, self._literals)

        return BlockDraft(size=len(code.code), encode=encode)

    def _encode_alike(
        self,
        shape: _Shape,
        template: _Template,
        plan: BlockPlan,
        targets: Sequence[Addr],
        addr: Addr,
    ) -> BlockCode:
        """Return a block that has a template's shape, but for where it lies."""
        if not shape.has_layout_at(addr, template.layout.size):
            return self.encode(plan, addr)
        try:
            return template.relocate(self._sums(plan, addr, targets, template.has_literal))
        except struct.error:
            return encode_block(plan, addr, self._literals)  # says what is out of reach

    def _encode_first(
        self, shape: _Shape, plan: BlockPlan, addr: Addr, targets: Sequence[Addr]
    ) -> BlockCode:
        """Encode the first block of a shape; keep it as a template if all is clear."""
        relocations: list[Relocation] = []
        literals = _NotedLiterals(self._literals)
        code = encode_block(plan, addr, literals, relocations)
        known = _name_values(plan, targets, literals.addrs)
        places = [(relocation, _name(relocation, known)) for relocation in relocations]
        # Where two addresses are the same it cannot be told which of them is meant.
        if all(name != _UNKNOWN for _, name in places):
            if len(self._templates) >= MAX_TEMPLATES:
                self._templates.clear()
            self._templates[shape] = self._make(code, plan, addr, targets, places)
        return code

    def _make(
        self,
        code: BlockCode,
        plan: BlockPlan,
        addr: Addr,
        targets: Sequence[Addr],
        places: Sequence[tuple[Relocation, int]],
    ) -> _Template:
        """Return the template of a block whose places have names."""
        named = {name for _, name in places}
        has_literal = tuple(
            _N_SHARED_SUMS + number * _N_TARGET_SUMS + _TO_LITERAL in named
            for number in range(len(targets))
        )
        sums = self._sums(plan, addr, targets, has_literal)
        constants: list[bytes] = []
        fields: list[tuple[int, int]] = []
        layout, end = "<", 0
        for relocation, name in sorted(places, key=lambda place: place[0].off):
            size = _WORD_SIZE if relocation.kind is RelocationKind.OWN else DISP32_SIZE
            constants.append(code.code[end : relocation.off])
            end = relocation.off + size
            layout += f"{len(constants[-1])}s{'Q' if size == _WORD_SIZE else 'i'}"
            field = int.from_bytes(
                code.code[relocation.off : end], "little", signed=size == DISP32_SIZE
            )
            fields.append((field - sums[name], name))
        constants.append(code.code[end:])
        return _Template(
            layout=struct.Struct(f"{layout}{len(constants[-1])}s"),
            constants=tuple(constants),
            fields=tuple(fields),
            has_literal=has_literal,
            text_size=code.text_size,
        )

    def _sums(
        self, plan: BlockPlan, addr: Addr, targets: Sequence[Addr], has_literal: Sequence[bool]
    ) -> list[int]:
        """Return what may be added to fields."""
        cells = plan.miss_count_addr or 0
        shared = 0 if plan.rows is None else plan.rows.shared_addr
        loaded = (plan.load.data_addr or 0) if plan.load is not None else 0
        sums = [addr, cells - addr, plan.miss_addr - addr, loaded - addr, -addr, cells - shared]
        for target, reads in zip(targets, has_literal, strict=True):
            literal = self._literals.addr_of(target) - addr if reads else 0
            sums += (target - addr, target, literal)
        return sums


class _NotedLiterals:
    """Literals, with a note of which were asked for."""

    def __init__(self, literals: LiteralPool) -> None:
        """Begin with none."""
        self._literals = literals
        self.addrs: dict[int, Addr] = {}

    def addr_of(self, value: int) -> Addr:
        """Return the address of a literal."""
        self.addrs[value] = addr = self._literals.addr_of(value)
        return addr


def _name_values(
    plan: BlockPlan, targets: Sequence[Addr], literals: dict[int, Addr]
) -> dict[int, int]:
    """Return for each address that a block names which sum has it."""
    names: list[tuple[int, int]] = [(plan.miss_addr, _THUNK)]
    if plan.load is not None and plan.load.data_addr is not None:
        names.append((plan.load.data_addr, _LOADED))
    names += [(cell, _CELLS) for cell in _cells_of(plan)]
    of_target: dict[int, int] = {}
    for number, target in enumerate(targets):
        first = _N_SHARED_SUMS + number * _N_TARGET_SUMS
        names.append((target, first + _TO_TARGET))
        of_target[target] = first + _TO_LITERAL
    # The literals of no target are those of rows, the same for all blocks of these rows.
    names += [(addr, of_target.get(value, _FIXED)) for value, addr in literals.items()]
    known: dict[int, int] = {}
    for value, name in names:
        if known.setdefault(value, name) != name:
            known[value] = _UNKNOWN
    return known


def _addr_rest(tree: Sequence[int], rows: CounterRows | None, addr: Addr) -> int:
    """Return where in a line a block starts, as far as padding may depend on it."""
    if any(code & _HALVED for code in tree):
        return addr % LINE_SIZE
    return 0 if rows is None else addr % RECORD_ALIGNMENT


def _walk(node: TreeNode, targets: list[Addr], tree: list[int]) -> bool:
    """Note the targets and the nodes of a tree; False if it has no shape."""
    match node:
        case Miss():
            tree.append(0)
            return True
        case Guard(target, below, otherwise, falls_below):
            if len(targets) == MAX_GUARDS:
                return False
            targets.append(target)
            code = 1 | fits_immediate(target) << 1 | falls_below << 2 | (below is None) << 3
            is_halved = below is not None and not isinstance(
                otherwise if falls_below else below, Miss
            )
            tree.append(code | _HALVED * is_halved)
            if below is not None and not _walk(below, targets, tree):
                return False
            return _walk(otherwise, targets, tree)
        case _:
            return False


def _cells_of(plan: BlockPlan) -> list[Addr]:
    """Return the addresses of all cells that a block names."""
    cells = [addr for _, addr in plan.hit_count_addrs]
    for slot in plan.open_slots:
        cells += (slot.target_addr, slot.count_addr)
    if plan.miss_count_addr is not None:
        cells += (plan.miss_count_addr, Addr(plan.miss_count_addr - CELL_SIZE))
    return cells


def _shape_of(plan: BlockPlan, addr: Addr, targets: Sequence[Addr], tree: list[int]) -> _Shape:
    """Return the shape of a block."""
    first = plan.miss_count_addr or 0
    cells: list[int | None] = []
    if targets:
        hits = dict(plan.hit_count_addrs)
        cells += [hits[target] - first if target in hits else None for target in targets]
    for slot in plan.open_slots:
        cells += (slot.target_addr - first, slot.count_addr - first)
    return _Shape(
        plan.operand,
        tuple(tree),
        tuple(cells),
        plan.miss_count_addr is not None,
        tuple(target in plan.thunk_targets for target in targets),
        plan.rows,
        plan.is_below_stack_free,
        b"" if plan.load is None else plan.load.code,
        _addr_rest(tree, plan.rows, addr),
    )


def _name(relocation: Relocation, known: dict[int, int]) -> int:
    """Return the sum that a relocation takes."""
    match relocation.kind:
        case RelocationKind.OWN:
            return _OWN
        case RelocationKind.ROW_OFFSET:
            return _ROW
        case RelocationKind.RELATIVE:
            return known.get(relocation.value, _UNKNOWN)
        case RelocationKind.VALUE:
            name = known.get(relocation.value, _UNKNOWN)
            return _UNKNOWN if name < _N_SHARED_SUMS else name - _TO_TARGET + _VALUE
