# SPDX-License-Identifier: Apache-2.0
"""Blocks in an arena: write them once, redirect them by one store.

A block's bytes never change while it is live, but for its head: one aligned
8-byte store makes it ``jmp`` elsewhere, another takes that back. Threads inside
the block finish the old way; threads that enter it after go the new way. Both
are right, whichever of them a thread takes.

Behind a head that leads elsewhere nobody is after a grace period. Then those
bytes may be replaced (``rewrite``), and the head made to lead to them: the block
does another's work, and who leads to it need not know.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from optpoline.errors import ArenaError, EncodeRangeError
from optpoline.model import CELL_SIZE, Addr, BlockPlan, OperandLoad
from optpoline.patch.arena import Arena
from optpoline.patch.extents import Extent
from optpoline.patch.layout import BlockKind
from optpoline.x86.assembler import JMP32_OPCODE, JMP32_SIZE, BlockCode
from optpoline.x86.blocks import HEAD_SIZE, LINE_SIZE, POISON, encode_redirect, place_block
from optpoline.x86.plain_branches import encode_plain_thunk

__all__ = [
    "Block",
    "add_block",
    "add_plain_thunk",
    "counter_cells",
    "make_fit",
    "point_back",
    "redirect",
    "redirection_of",
    "rewrite",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Block:
    """One block as it was written.

    Attributes:
        arena: Where it is.
        addr: Its first instruction.
        size: Bytes.
        plan: What it does.
        head: Its first bytes as encoded, to undo a redirection.
    """

    arena: Arena
    addr: Addr
    size: int
    plan: BlockPlan
    head: bytes


def add_block(arena: Arena, plan: BlockPlan, *, site_addr: Addr, slack_ratio: float = 0.0) -> Block:
    """Encode a plan, write it to the arena, return the block; nothing leads to it yet.

    On error: the plan's counter cells are free again.

    Args:
        arena: Where to.
        plan: What it does; its counter cells are the arena's.
        site_addr: The site it is for.
        slack_ratio: Room behind it to be left for a bigger one, as a share of its size.

    Raises:
        ArenaError: if the arena is used up.
        EncodeRangeError: if a target or the thunk is out of reach.
    """
    try:
        return _add_block(arena, plan, site_addr, slack_ratio)
    except (ArenaError, EncodeRangeError):
        arena.free_counters(*counter_cells(plan))
        raise


def _add_block(arena: Arena, plan: BlockPlan, site_addr: Addr, slack_ratio: float) -> Block:
    """Encode a plan and write it."""
    # Halves keep to lines, and descriptors at a block's end are aligned, so its place decides on
    # some bytes of its size: not where it starts a line, as every counting block does and each
    # that fits none, nor where it lies in one.
    is_counting = plan.rows is not None
    # The next line, where big ones go: for another place they are encoded anew.
    free = arena.addr + _find_room(arena, 1, is_counting=False).at
    draft = arena.templates.draft(plan, Addr(free + -free % LINE_SIZE))
    room = _find_room(arena, draft.size, is_counting, slack_ratio)
    code = draft.encode(Addr(arena.addr + room.at))
    kind = BlockKind.COUNTING if is_counting else BlockKind.PROMOTED
    addr = arena.put_block(room, code, site_addr=site_addr, kind=kind, cells=counter_cells(plan))
    size = len(code.code)
    return Block(arena=arena, addr=addr, size=size, plan=plan, head=arena.head_of(addr))


def add_plain_thunk(
    arena: Arena, operand: str, load: OperandLoad | None = None, *, site_addr: Addr
) -> Addr:
    """Write what a plain site's blocks end at, unless it is there, and return its address.

    Each site has its own, as it had its own branch: predictors tell branches apart by
    their addresses, too.

    Args:
        arena: Where to.
        operand: Register that holds the target.
        load: What loads it first, or None.
        site_addr: The site.

    Raises:
        ArenaError: if the arena is used up.
        EncodeRangeError: if what is to be loaded is out of reach.
    """
    for addr, known in arena.thunks_of(site_addr):
        if encode_plain_thunk(operand, load, addr).code == known:
            return addr
    size = len(encode_plain_thunk(operand, load, arena.addr).code)
    room = _find_room(arena, size, is_counting=False)
    code = encode_plain_thunk(operand, load, arena.addr + room.at)
    none = (Addr(0), 0)
    return arena.put_block(room, code, site_addr=site_addr, kind=BlockKind.THUNK, cells=none)


def _find_room(arena: Arena, size: int, is_counting: bool, slack_ratio: float = 0.0) -> Extent:
    """Return where a block of ``size`` bytes would go; a counting block starts a line."""
    # One that fits no line starts one.
    least = LINE_SIZE + 1 if is_counting else 1
    room_size = size + int(slack_ratio * size)
    return arena.find_room(room_size, lambda addr: place_block(addr, max(size, least)))


def counter_cells(plan: BlockPlan) -> tuple[Addr, int]:
    """Return where a plan's counter cells begin, and how many there are, adjacent.

    The cells of a trace are not among them: blocks share those.
    """
    cells = [addr for _, addr in plan.hit_count_addrs]
    cells += [addr for slot in plan.open_slots for addr in (slot.target_addr, slot.count_addr)]
    cells += [] if plan.miss_count_addr is None else [plan.miss_count_addr]
    if plan.rows is not None and plan.miss_count_addr is not None:
        cells.append(Addr(plan.miss_count_addr - CELL_SIZE))  # the last that found no slot
    return min(cells, default=Addr(0)), len(cells)


def redirect(block: Block, dst_addr: Addr) -> None:
    """Make all who enter ``block`` from now on go to ``dst_addr``.

    Target state: running; one aligned 8-byte store.
    """
    block.arena.store_u64(block.addr, encode_redirect(block.head, block.addr, dst_addr))


def redirection_of(arena: Arena, addr: Addr) -> Addr | None:
    """Return where the head of the block at ``addr`` jumps to, or None if it does not.

    A block that is nothing but a jump counts as redirected, too.
    """
    head = arena.head_of(addr)
    if head[:1] != JMP32_OPCODE:
        return None
    disp = int.from_bytes(head[1:JMP32_SIZE], "little", signed=True)
    return Addr(addr + JMP32_SIZE + disp)


def point_back(block: Block) -> None:
    """Undo ``redirect``: the block does its own work again."""
    block.arena.store_u64(block.addr, int.from_bytes(block.head, "little"))


def make_fit(block: Block, plan: BlockPlan) -> Block | None:
    """Return the block that ``rewrite`` would make of ``block``, and keep the room for it.

    It counts its misses where ``block`` does: threads that are elsewhere by now may count in
    the plan's own cell for long.

    Returns:
        The block as it would be; None if it has no room, or cannot reach what the plan names.
    """
    fit = _fit(block, plan)
    return None if fit is None else fit[0]


def _fit(block: Block, plan: BlockPlan) -> tuple[Block, BlockCode] | None:
    """Do what ``make_fit`` says; return the code as well."""
    arena = block.arena
    plan = replace(plan, miss_count_addr=block.plan.miss_count_addr)
    try:
        code = arena.templates.encode(plan, block.addr)
        if not arena.make_room(block.addr, len(code.code)):
            return None
    except (ArenaError, EncodeRangeError):
        return None
    head = code.code[:HEAD_SIZE].ljust(HEAD_SIZE, bytes((POISON,)))
    return replace(block, size=len(code.code), plan=plan, head=head), code


def rewrite(block: Block, plan: BlockPlan, ahead: Addr) -> Block | None:
    """Write what a plan says over the body of ``block``, whose head leads elsewhere, as before.

    Block and plan are those of promoted blocks. ``point_back`` makes the block that is returned
    do its own work. Only after a grace period since the head was made to lead elsewhere.

    Args:
        block: The block.
        plan: What it is to do, but for where it counts its misses (``make_fit``).
        ahead: Where its head leads: another block of its site, or the thunk.

    Target state: running.

    Returns:
        The block as it is now; None if there is none that fits (``make_fit``).
    """
    fit = _fit(block, plan)
    if fit is None:
        return None
    written, code = fit
    block.arena.rewrite_block(block.addr, code, encode_redirect(written.head, block.addr, ahead))
    return written
