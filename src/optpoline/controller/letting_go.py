# SPDX-License-Identifier: Apache-2.0
"""Let go: restore the text, wait until nobody can be in an arena, unmap it.

Once no text leads into an arena nobody can enter it, so a thread that was seen
quiescent for it stays so: threads are looked at one by one, over as many short
stops as it takes, and never wait for each other.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from optpoline.controller.arenas import unmap_range
from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome, DetachResult, SiteState
from optpoline.controller.target import Target
from optpoline.errors import ArenaError, ProcessGone, StopTimeout, UnsupportedTarget
from optpoline.model import Addr, Refusal
from optpoline.patch.blocks import point_back
from optpoline.patch.quiescence import (
    MAX_STACK_SCAN_SIZE,
    ThreadPosition,
    find_words,
    is_thread_quiescent,
)
from optpoline.process.procfs import ThreadWhere, list_tids, read_thread_state
from optpoline.process.stop import Stop

__all__ = ["let_go", "unmap_when_quiescent"]

MAX_TRIES = 50
"""Stops tried before an arena is left: a thread inside a block leaves it within
nanoseconds of running, so what is still there then sits in a blocked handler."""

TRY_EVERY_S = 0.01

MAX_SEARCH_SIZE = 4 << 30
"""Bytes of writable memory searched for contexts of programs that switch stacks."""


def let_go(target: Target, records: Sequence[SiteRecord], *, leave: bool) -> DetachResult:
    """End a session's work on its target.

    Args:
        target: The process.
        records: Its sites.
        leave: Keep promoted sites promoted.

    Raises:
        StopTimeout: if its threads could not be stopped; everything still works.
    """
    try:
        return _let_go(target, records, leave=leave)
    except ProcessGone:
        return DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())


def _let_go(target: Target, records: Sequence[SiteRecord], *, leave: bool) -> DetachResult:
    """Do it, or raise ``ProcessGone``."""
    linker = Linker(target)
    target.read_maps()
    # Text of a module that was unloaded meanwhile is gone with it.
    touched = [r for r in records if r.home is not None and target.is_code(r.site.addr)]
    moves: list[Move] = []
    for record in touched:
        if record.counting is not None and record.active is not None:
            point_back(record.active)
        keep = leave and record.state is SiteState.PROMOTED
        moves.append(Move(record=record, block=record.active if keep else None))
    for _ in range(MAX_TRIES):
        linker.link(moves)
        moves = [m for m in moves if m.record.home is not m.block and _is_ours(m.record)]
        if not moves:
            break
        # A thread sleeps in a call that must not be interrupted: it may soon return.
        time.sleep(TRY_EVERY_S)
    foreign = tuple(int(r.site.addr) for r in touched if r.home and not _is_ours(r))
    if leave:
        for record in touched:
            if record.home is None:
                record.state = SiteState.BASELINE
        return DetachResult(outcome=DetachOutcome.LEFT, restored=0, foreign=foreign, notes=())
    stuck = [r for r in touched if r.home is not None and int(r.site.addr) not in foreign]
    for record in touched:
        if record.home is None and record.state is not SiteState.REFUSED:
            record.state = SiteState.BASELINE
    restored = len(touched) - len(stuck) - len(foreign)
    if stuck or foreign:
        note = f"{len(stuck) + len(foreign)} sites could not be restored; their arenas stay mapped"
        outcome = DetachOutcome.FOREIGN_BYTES if foreign else DetachOutcome.INCOMPLETE
        return DetachResult(outcome=outcome, restored=restored, foreign=foreign, notes=(note,))
    ranges = [(arena.addr, arena.end) for arena in target.arenas]
    notes = unmap_when_quiescent(target, ranges)
    return DetachResult(
        outcome=DetachOutcome.ARENA_LEFT if notes else DetachOutcome.CLEAN,
        restored=restored,
        foreign=(),
        notes=notes,
    )


def _is_ours(record: SiteRecord) -> bool:
    """Tell whether a site holds the bytes we wrote, as far as we know."""
    return record.refusal is not Refusal.FOREIGN_BYTES


def unmap_when_quiescent(target: Target, ranges: Sequence[tuple[Addr, Addr]]) -> tuple[str, ...]:
    """Unmap address ranges that no text leads to, each as a whole.

    Returns:
        A sentence for what had to be left, or nothing.
    """
    if not ranges:
        return ()
    name = f"the arena at {min(r[0] for r in ranges):#x} stays mapped"
    quiescent: set[int] = set()
    stacks: set[tuple[int, int]] = set()
    holders: tuple[int, ...] = ()
    try:
        for _ in range(MAX_TRIES):
            with target.stop() as stop:
                holders = _find_holders(target, stop, ranges, quiescent, stacks)
            if not holders:
                break
            time.sleep(TRY_EVERY_S)
        else:
            names = ", ".join(str(tid) for tid in holders)
            return (f"{name}: threads {names} may still return into it",)
        if _find_switched_away(target, ranges, tuple(stacks)):
            return (f"{name}: a saved context may still return into it",)
        with target.stop(wake_one=True) as stop:
            for first, last in ranges:
                unmap_range(stop, first, last)
    except (StopTimeout, ArenaError, UnsupportedTarget) as error:
        return (f"{name}: {error}",)
    return ()


def _find_holders(
    target: Target,
    stop: Stop,
    ranges: Sequence[tuple[Addr, Addr]],
    quiescent: set[int],
    stacks: set[tuple[int, int]],
) -> tuple[int, ...]:
    """Return threads that may still be inside; add the others to ``quiescent``.

    Adds the mappings that hold nothing but a thread's stack to ``stacks``.
    """
    positions = {
        thread.tid: ThreadPosition(tid=thread.tid, pc=thread.pc, sp=thread.sp)
        for thread in stop.stopped
    }
    for tid in stop.asleep:
        if tid not in quiescent:
            sleeper = _find_quiescent_sleeper(target, tid, ranges)
            if sleeper is not None:
                quiescent.add(tid)
                _add_stack(target, sleeper.sp, stacks)
    for tid, position in positions.items():
        _add_stack(target, position.sp, stacks)
        if tid not in quiescent and _is_quiescent(target, position, ranges):
            quiescent.add(tid)
    return tuple(tid for tid in list_tids(target.pid) if tid not in quiescent)


def _is_quiescent(
    target: Target, position: ThreadPosition, ranges: Sequence[tuple[Addr, Addr]]
) -> bool:
    """Tell whether a thread is quiescent for all ranges."""
    return all(
        is_thread_quiescent(
            position, read=target.memory.read, maps=target.maps, start=first, end=last
        )
        for first, last in ranges
    )


def _add_stack(target: Target, sp: Addr, stacks: set[tuple[int, int]]) -> None:
    """Note a mapping that is scanned as a stack, so that dead frames in it do not count."""
    for mapping in target.maps:
        if not mapping.start <= sp < mapping.end or mapping.path == "[heap]":
            continue
        if mapping.path == "[stack]" or mapping.size <= MAX_STACK_SCAN_SIZE:
            stacks.add((mapping.start, mapping.end))


def _find_quiescent_sleeper(
    target: Target, tid: int, ranges: Sequence[tuple[Addr, Addr]]
) -> ThreadPosition | None:
    """Return where a sleeping thread is if it is quiescent, without stopping it.

    What was read counts only if the thread did not run meanwhile.
    """
    try:
        before = read_thread_state(target.pid, tid)
        if before.state in "ZX":
            return ThreadPosition(tid=tid, pc=Addr(0), sp=Addr(0))
        if before.where is ThreadWhere.RUNNING:
            return None
        position = ThreadPosition(tid=tid, pc=before.pc, sp=before.sp)
        if not _is_quiescent(target, position, ranges):
            return None
        after = read_thread_state(target.pid, tid)
    except ProcessGone:
        return None
    switches = (before.n_voluntary, before.n_nonvoluntary)
    return position if (after.n_voluntary, after.n_nonvoluntary) == switches else None


def _find_switched_away(
    target: Target,
    ranges: Sequence[tuple[Addr, Addr]],
    stacks: Sequence[tuple[int, int]],
) -> bool:
    """Tell whether memory outside the threads' stacks holds a context inside a range."""
    for first, last in ranges:
        found = find_words(
            read=target.memory.read,
            maps=target.maps,
            skip=stacks,
            start=first,
            end=last,
            max_size=MAX_SEARCH_SIZE,
        )
        if found != 0:
            return True
    return False
