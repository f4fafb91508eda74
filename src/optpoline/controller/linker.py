# SPDX-License-Identifier: Apache-2.0
"""Link sites to blocks or back to their baseline, many at a time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.controller.poking import poke_in_stops
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.target import Target
from optpoline.errors import ProcessGone
from optpoline.model import Addr, Refusal
from optpoline.patch.blocks import Block, redirect
from optpoline.patch.text import Poke, direct_opcodes, read_entries
from optpoline.x86.assembler import encode_disp32

__all__ = ["Linker", "Move"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """Where one site's text shall lead: a block, or None for its baseline."""

    record: SiteRecord
    block: Block | None


class Linker:
    """Changes text; the only writer of ``SiteRecord.branch`` and ``home``."""

    def __init__(self, target: Target) -> None:
        """Work on one target."""
        self._target = target

    def link(self, moves: Sequence[Move], *, may_delay: bool = False) -> int:
        """Change all sites of a batch, in as few stops as their length allows.

        Sites that hold another patcher's bytes are left and refused. Sites
        whose displacement crosses a cache line, and plain ones, are written only
        if every thread could be stopped; else they stay where they are.

        Args:
            moves: Where each site shall lead.
            may_delay: Whether timeouts of waits may begin again where it takes that.

        Returns:
            How many sites lead where they should.
        """
        pokes: list[tuple[Move, Poke]] = []
        for move in moves:
            record = move.record
            new = record.entry.original if move.block is None else _branch_to(record, move.block)
            if new != record.branch:
                pokes.append((move, Poke(entry=record.entry, expected=record.branch, new=new)))
            else:
                record.home = move.block
        if not pokes:
            return len(moves)
        return len(moves) - self._poke(pokes, may_delay)

    def _poke(self, pokes: Sequence[tuple[Move, Poke]], may_delay: bool) -> int:
        """Poke, note what became of each; return how many did not move."""
        self._target.read_maps()
        for move, _ in pokes:
            if not self._target.has_site(move.record):
                move.record.forget_links()
        pokes = [(move, poke) for move, poke in pokes if self._target.has_site(move.record)]
        if not self._target.memory.is_current():
            pid = self._target.pid
            raise ProcessGone(pid, f"process {pid} has exited or runs a new program")
        by_entry = {poke.entry.addr: move for move, poke in pokes}
        batch = [poke for _, poke in pokes]
        try:
            result = poke_in_stops(self._target, batch, may_delay=may_delay)
        except ProcessGone:
            raise
        except BaseException:
            self._note_truth(by_entry, batch)
            raise
        for poke in result.done:
            move = by_entry[poke.entry.addr]
            left = move.record.learner if move.record.home is None else move.record.home
            if left is not None and left is not move.block and _counts_hits(left):
                # A child forked while we learned has the text of then: spare it the counting.
                _lead_on(left, move)
            move.record.branch = poke.new
            move.record.home = move.block
        for poke in result.left:
            move = by_entry[poke.entry.addr]
            if move.record.home is not None:
                _lead_on(move.record.home, move)
        for poke in result.reloaded:
            by_entry[poke.entry.addr].record.forget_links()
        if result.foreign:
            self._target.read_maps()
        for poke in result.foreign:
            record = by_entry[poke.entry.addr].record
            if not self._target.has_site(record):
                # Its module was unloaded in the last moment, and another one is there.
                record.forget_links()
                continue
            record.state = SiteState.REFUSED
            record.refusal = Refusal.FOREIGN_BYTES
        return len(pokes) - len(result.done)

    def _note_truth(self, by_entry: dict[Addr, Move], batch: Sequence[Poke]) -> None:
        """Look where the sites of a batch that failed half-way lead, so that it can be undone."""
        found = read_entries(self._target.memory, [poke.entry for poke in batch])
        for poke in batch:
            move, code = by_entry[poke.entry.addr], found[poke.entry.addr]
            if code == poke.entry.with_changed(poke.new):
                move.record.branch = poke.new
                move.record.home = move.block


def _lead_on(block: Block, move: Move) -> None:
    """Do by a redirection of a site's block what could not be done in the text."""
    redirect(block, move.block.addr if move.block is not None else move.record.thunk_addr)


def _branch_to(record: SiteRecord, block: Block) -> bytes:
    """Return what leads a site to a block: a displacement, with an opcode at a plain site."""
    disp = encode_disp32(record.entry.end, block.addr)
    if not record.entry.opcode_size:
        return disp
    (opcode,) = direct_opcodes(record.entry)
    return opcode + disp


def _counts_hits(block: Block) -> bool:
    """Tell whether a block is a counting block; a promoted one counts misses only."""
    return bool(block.plan.hit_count_addrs or block.plan.open_slots)
