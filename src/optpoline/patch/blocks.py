# SPDX-License-Identifier: Apache-2.0
"""Blocks in an arena: write them once, redirect them by one store.

A block's bytes never change after it was written, but for its head: one aligned
8-byte store makes it ``jmp`` elsewhere, another takes that back. Threads inside
the block finish the old way; threads that enter it after go the new way. Both
are right, whichever of them a thread takes.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.model import Addr, BlockPlan
from optpoline.patch.arena import Arena
from optpoline.x86.blocks import LINE_SIZE, encode_block, encode_redirect, place_block

__all__ = ["Block", "add_block", "point_back", "redirect"]


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


def add_block(arena: Arena, plan: BlockPlan) -> Block:
    """Encode a plan, write it to the arena, return the block; nothing leads to it yet.

    Raises:
        ArenaError: if the arena is used up.
        EncodeRangeError: if a target or the thunk is out of reach.
    """
    # Only displacements out of the block depend on its place, so its size does not; most
    # blocks with slots or counters start a line, so try that first.
    next_addr = arena.next_block_addr()
    is_big = bool(plan.open_slots or plan.hit_count_addrs)
    guess = place_block(next_addr, LINE_SIZE + 1) if is_big else next_addr
    code = encode_block(plan, guess, arena)
    place = place_block(next_addr, len(code))
    if place != guess:
        code = encode_block(plan, place, arena)
    arena.skip_to(place)
    addr = arena.add_block(code)
    return Block(arena=arena, addr=addr, size=len(code), plan=plan, head=arena.head_of(addr))


def redirect(block: Block, dst_addr: Addr) -> None:
    """Make all who enter ``block`` from now on go to ``dst_addr``.

    Target state: running; one aligned 8-byte store.
    """
    block.arena.store_u64(block.addr, encode_redirect(block.head, block.addr, dst_addr))


def point_back(block: Block) -> None:
    """Undo ``redirect``: the block does its own work again."""
    block.arena.store_u64(block.addr, int.from_bytes(block.head, "little"))
