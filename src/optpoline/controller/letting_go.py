# SPDX-License-Identifier: Apache-2.0
"""Let go: restore the text, wait until nobody can be in an arena, unmap it.

An arena that no text leads to is retired code like any other: it is unmapped
after a grace period (``patch/grace.py``).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Collection, Sequence

from optpoline.controller.address_space import target_space
from optpoline.controller.arenas import unmap_range
from optpoline.controller.linker import Linker, Move
from optpoline.controller.observer import ThreadObserver
from optpoline.controller.poking import MAX_TRIES, TRY_EVERY_S, poke_patiently
from optpoline.controller.records import SiteRecord
from optpoline.controller.stale_sections import clear_stale_sections, find_stale_sections
from optpoline.controller.summary import DetachOutcome, DetachResult, SiteState
from optpoline.controller.target import Target
from optpoline.controller.wording import count_of
from optpoline.errors import (
    ArenaError,
    AttachError,
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    StopTimeout,
    UnsupportedTarget,
)
from optpoline.model import Addr, Refusal
from optpoline.patch.blocks import point_back, redirect
from optpoline.patch.descriptors import cut_out_descriptors, find_descriptors
from optpoline.patch.grace import GracePeriods, RetiredCode
from optpoline.patch.text import Poke, is_same_but_disp, leads_into, read_entries
from optpoline.process.cpus import read_n_possible_cpus
from optpoline.process.permissions import find_tracer
from optpoline.process.rseq import find_rseq_holders
from optpoline.process.stop import Wake

__all__ = ["let_go", "unmap_or_say_why", "unmap_when_quiescent"]

GRACE_PERIOD_S = 0.5
"""A thread inside a block leaves it within nanoseconds of running, so who is still there
after that sits in a blocked handler."""

MAX_NAMED = 8
"""Threads named in a note."""

MAX_GRACE_PERIODS = 20
"""Searches of all memory for saved PCs; a preempted coroutine may soon run on."""


def let_go(target: Target, records: Sequence[SiteRecord], *, leave: bool) -> DetachResult:
    """End a session's work on its target.

    Args:
        target: The process.
        records: Its sites.
        leave: Keep promoted sites promoted.

    Returns:
        What was done; INCOMPLETE if its threads could not be stopped, because a debugger
        traces them or they do not stop in time. Then everything still works, and the notes
        say what is left.
    """
    linked = [record for record in records if record.home is not None]
    try:
        return _let_go(target, records, leave=leave)
    except ProcessGone:
        return DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())
    except (AttachError, StopTimeout) as error:
        try:
            return _tell_undone(target, linked, error, leave=leave)
        except ProcessGone:
            return DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())


def _tell_undone(
    target: Target, linked: Sequence[SiteRecord], error: OptpolineError, *, leave: bool
) -> DetachResult:
    """Say what a letting go that could not stop the threads has left.

    Sites that lead to a counting block still go on to their promoted one, or to their thunk,
    by a store that needs no stop: nobody is there any more who would read what they count.

    Args:
        target: The process.
        linked: Sites that led to blocks before.
        error: Why its threads could not be stopped.
        leave: Whether promoted sites were to stay promoted.
    """
    leave = leave and any(record.state is SiteState.PROMOTED for record in linked)
    target.read_maps()
    stuck = _leading(target, [record for record in linked if target.has_site(record)])
    learning = [record for record in stuck if record.state is not SiteState.PROMOTED]
    for record in stuck:
        active = record.active if record.state is SiteState.PROMOTED else None
        if record.home is not None and record.home is not active:
            redirect(record.home, record.thunk_addr if active is None else active.addr)
    is_stuck = {record.site.addr for record in stuck}
    for record in linked:
        if record.site.addr not in is_stuck and record.state is not SiteState.REFUSED:
            record.state = SiteState.BASELINE
    left = learning if leave else stuck
    if left:
        keep = "keeps" if len(left) == 1 else "keep"
        what = f"{count_of(len(left), 'site')} could not be restored, and {keep} working"
        outcome = DetachOutcome.INCOMPLETE
    else:
        what = "arenas stay mapped, nothing leads there"
        outcome = DetachOutcome.ARENA_LEFT
    note = f"{error.message}: {what}; `optpoline detach {target.pid}` undoes the rest later"
    return DetachResult(
        outcome=DetachOutcome.LEFT if leave else outcome,
        restored=0 if leave else len(linked) - len(stuck),
        foreign=(),
        notes=() if leave and not left else (note,),
    )


def _let_go(target: Target, records: Sequence[SiteRecord], *, leave: bool) -> DetachResult:
    """Do it, or raise ``ProcessGone``."""
    linker = Linker(target)
    # With nothing promoted there is nothing to leave.
    leave = leave and any(record.state is SiteState.PROMOTED for record in records)
    target.read_maps()
    # Text of a module that was unloaded meanwhile is gone with it.
    mapped = [record for record in records if target.has_site(record)]
    touched = [record for record in mapped if record.home is not None]
    touched += [record for record in _leading(target, mapped) if record.home is None]
    moves: list[Move] = []
    for record in touched:
        if record.counting is not None and record.active is not None:
            point_back(record.active)
        keep = leave and record.state is SiteState.PROMOTED
        moves.append(Move(record=record, block=record.active if keep else None))
    for left in reversed(range(MAX_TRIES)):
        # At last rather a timeout that ends late than a site that stays changed.
        linker.link(moves, may_delay=not left)
        moves = [m for m in moves if m.record.home is not m.block and _is_ours(m.record)]
        if not moves:
            break
        # A thread sleeps in a call that must not be interrupted: it may soon return.
        time.sleep(TRY_EVERY_S)
    for record in touched:
        if record.home is None and record.state is not SiteState.REFUSED:
            record.state = SiteState.BASELINE
    foreign = _find_foreign(target, touched)
    if leave:
        return DetachResult(outcome=DetachOutcome.LEFT, restored=0, foreign=foreign, notes=())
    _restore_unrecorded(target, {move.record.site.addr for move in moves})
    # The bytes themselves have the last word: an arena that text leads to stays.
    stuck = _leading(target, mapped)
    n_unrecorded = len(_find_unrecorded(target))
    if n_unrecorded and not stuck and not foreign:
        note = f"{count_of(n_unrecorded, 'site')} could not be restored; their arenas stay mapped"
        return DetachResult(
            outcome=DetachOutcome.INCOMPLETE,
            restored=len(touched),
            foreign=(),
            notes=(note,),
        )
    restored = len(touched) - len({*foreign, *(int(record.site.addr) for record in stuck)})
    if stuck or foreign:
        n_left = len(touched) - restored
        note = f"{count_of(n_left, 'site')} could not be restored; their arenas stay mapped"
        outcome = DetachOutcome.FOREIGN_BYTES if foreign else DetachOutcome.INCOMPLETE
        return DetachResult(outcome=outcome, restored=restored, foreign=foreign, notes=(note,))
    ranges = [(arena.addr, arena.end) for arena in target.arenas]
    code_ranges = [(arena.code_start, arena.used_code_end) for arena in target.arenas]
    notes = unmap_or_say_why(target, ranges, code_ranges)
    return DetachResult(
        outcome=DetachOutcome.ARENA_LEFT if notes else DetachOutcome.CLEAN,
        restored=restored,
        foreign=(),
        notes=notes,
    )


def _leading(target: Target, records: Sequence[SiteRecord]) -> list[SiteRecord]:
    """Return the sites whose bytes lead into an arena now, and note where they lead."""
    found = read_entries(target.memory, [record.entry for record in records])
    leading: list[SiteRecord] = []
    for record in records:
        entry, code = record.entry, found[record.entry.addr]
        if any(leads_into(entry, code, arena.addr, arena.end) for arena in target.arenas):
            leading.append(record)
            if is_same_but_disp(entry, code):
                record.branch = entry.changed_of(code)
    return leading


def _find_unrecorded(target: Target) -> list[Poke]:
    """Return what would restore each journalled site that leads into an arena now."""
    entries = [entry for arena in target.arenas for entry in arena.journalled]
    found = read_entries(target.memory, entries)
    pokes: list[Poke] = []
    for entry in entries:
        code = found[entry.addr]
        if any(leads_into(entry, code, arena.addr, arena.end) for arena in target.arenas):
            now = entry.changed_of(code)
            pokes.append(Poke(entry=entry, expected=now, new=entry.original))
    return pokes


def _restore_unrecorded(target: Target, tried: Collection[Addr]) -> None:
    """Restore sites whose records were dropped, because their module looked gone.

    Args:
        target: The process.
        tried: Sites that were tried long enough, and that somebody who sleeps is in the way of.
    """
    pokes = [poke for poke in _find_unrecorded(target) if poke.entry.addr not in tried]
    if pokes:
        poke_patiently(target, pokes)


def _find_foreign(target: Target, records: Sequence[SiteRecord]) -> tuple[int, ...]:
    """Return the sites that were left to another patcher and do not hold their baseline."""
    left = [record for record in records if not _is_ours(record)]
    found = read_entries(target.memory, [record.entry for record in left])
    return tuple(int(r.site.addr) for r in left if found[r.entry.addr] != r.entry.code)


def _is_ours(record: SiteRecord) -> bool:
    """Tell whether a site holds the bytes we wrote, as far as we know."""
    return record.refusal is not Refusal.FOREIGN_BYTES


def unmap_or_say_why(
    target: Target,
    ranges: Sequence[tuple[Addr, Addr]],
    code_ranges: Sequence[tuple[Addr, Addr]],
) -> tuple[str, ...]:
    """Unmap as ``unmap_when_quiescent`` does; say who is in the way, and what to do later.

    While a debugger holds the program, running or not, no system call can be run in it.
    """
    try:
        notes = unmap_when_quiescent(target, ranges, code_ranges)
    except PermissionDenied as denied:
        notes = (f"arenas stay mapped: {denied.message}",)
    if not notes:
        return ()
    undo = f"`optpoline detach {target.pid}` unmaps them later"
    tracer = find_tracer(target.pid)
    if tracer is not None:
        return (f"arenas stay mapped: {tracer} traces the program; once it has let go, {undo}",)
    return (*notes[:-1], f"{notes[-1]}; {undo}")


def unmap_when_quiescent(
    target: Target,
    ranges: Sequence[tuple[Addr, Addr]],
    code_ranges: Sequence[tuple[Addr, Addr]],
) -> tuple[str, ...]:
    """Unmap address ranges that no text leads to, all of them or none.

    Children that were forked have mappings of their own, which stay.

    Args:
        target: The process.
        ranges: Arenas.
        code_ranges: The parts of them that hold blocks.

    Returns:
        A sentence for what had to be left, or nothing.
    """
    if not ranges:
        return ()
    name = f"the arena at {min(r[0] for r in ranges):#x} stays mapped"
    space = target_space(target)
    grace = GracePeriods(ThreadObserver(lambda: (space,)), is_last=True)
    # Nothing leads to any block by now: the table says all that somebody may be inside.
    descriptors = [at for start, _ in ranges for at in find_descriptors(target.memory, start)]
    for start, end in cut_out_descriptors(code_ranges, sorted(descriptors)):
        grace.retire(RetiredCode(start, end))
    try:
        for _ in range(MAX_GRACE_PERIODS):
            fewest = sys.maxsize
            while not grace.synchronize(GRACE_PERIOD_S):
                # Of thousands of busy threads some are seen in each stop.
                if len(grace.holders) >= fewest:
                    return (f"{name}: {_name_threads(grace)} may return into it",)
                fewest = len(grace.holders)
            if grace.is_idle:
                break
            if grace.is_search_refused:
                return (f"{name}: the program has too much memory to search it for saved PCs",)
            time.sleep(TRY_EVERY_S)
        else:
            if grace.holders:
                return (f"{name}: {_name_threads(grace)} may return into it",)
            return (f"{name}: memory of the program holds an address in it, perhaps a saved PC",)
        return _unmap(target, ranges, descriptors, name)
    except (StopTimeout, ArenaError, UnsupportedTarget) as error:
        return (f"{name}: {error}",)


def _unmap(
    target: Target,
    ranges: Sequence[tuple[Addr, Addr]],
    descriptors: Sequence[Addr],
    name: str,
) -> tuple[str, ...]:
    """Unmap ranges that nobody is in, unless a thread's ``rseq_cs`` still points there.

    Blocks take it back before they leave, so none does, but in a program that a debugger
    has taken out of a block, or that writes there itself; and what a forked child keeps of
    its parent's threads, which is cleared here.
    """
    stale = find_stale_sections(target, descriptors, read_n_possible_cpus())
    for left in reversed(range(MAX_TRIES)):
        with target.stop(Wake.ONE_FOR_INJECTION) as stop:
            holders = find_rseq_holders(stop.read_rseq_registrations(), target.memory, ranges)
            if not holders:
                clear_stale_sections(target.memory, stale, descriptors)
                for first, last in ranges:
                    unmap_range(stop, first, last)
                return ()
        if left:
            time.sleep(TRY_EVERY_S)  # the kernel clears it when it next comes by
    return (f"{name}: the restartable sequence of {_name_tids(holders)} is still in it",)


def _name_threads(grace: GracePeriods) -> str:
    """Name the threads that hold up a grace period."""
    return _name_tids([tid for _, tid in grace.holders])


def _name_tids(holders: Sequence[int]) -> str:
    """Name threads."""
    tids = [str(tid) for tid in holders]
    named = ", ".join(tids[:MAX_NAMED])
    more = len(tids) - MAX_NAMED
    return f"threads {named} and {more} more" if more > 0 else f"threads {named}"
