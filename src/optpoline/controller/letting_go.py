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
from optpoline.model import Addr, Mapping, Refusal
from optpoline.patch.blocks import point_back
from optpoline.patch.quiescence import (
    MAX_STACK_SCAN_SIZE,
    ThreadPosition,
    find_words,
    is_thread_quiescent,
)
from optpoline.patch.text import is_same_but_disp, leads_into, read_entries
from optpoline.process.procfs import (
    ThreadWhere,
    list_tids,
    read_state_char,
    read_thread_state,
)
from optpoline.process.stop import Stop

__all__ = ["let_go", "unmap_when_quiescent"]

MAX_TRIES = 50
"""Stops tried before an arena is left: a thread inside a block leaves it within
nanoseconds of running, so what is still there then sits in a blocked handler."""

TRY_EVERY_S = 0.01

MAX_SEARCHES = 5
"""Searches of all memory for saved PCs; a preempted coroutine may soon run on."""

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
    for _ in range(MAX_TRIES):
        linker.link(moves)
        moves = [m for m in moves if m.record.home is not m.block and _is_ours(m.record)]
        if not moves:
            break
        # A thread sleeps in a call that must not be interrupted: it may soon return.
        time.sleep(TRY_EVERY_S)
    for record in touched:
        if record.home is None and record.state is not SiteState.REFUSED:
            record.state = SiteState.BASELINE
    foreign = tuple(int(record.site.addr) for record in touched if not _is_ours(record))
    if leave:
        return DetachResult(outcome=DetachOutcome.LEFT, restored=0, foreign=foreign, notes=())
    # The bytes themselves have the last word: an arena that text leads to stays.
    stuck = _leading(target, mapped)
    restored = len(touched) - len({*foreign, *(int(record.site.addr) for record in stuck)})
    if stuck or foreign:
        n_left = len(touched) - restored
        note = f"{n_left} sites could not be restored; their arenas stay mapped"
        outcome = DetachOutcome.FOREIGN_BYTES if foreign else DetachOutcome.INCOMPLETE
        return DetachResult(outcome=outcome, restored=restored, foreign=foreign, notes=(note,))
    ranges = [(arena.addr, arena.end) for arena in target.arenas]
    code_ranges = [(arena.code_start, arena.next_block_addr()) for arena in target.arenas]
    notes = unmap_when_quiescent(target, ranges, code_ranges)
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
                record.disp = code[entry.disp_off : entry.disp_off + 4]
    return leading


def _is_ours(record: SiteRecord) -> bool:
    """Tell whether a site holds the bytes we wrote, as far as we know."""
    return record.refusal is not Refusal.FOREIGN_BYTES


def unmap_when_quiescent(
    target: Target,
    ranges: Sequence[tuple[Addr, Addr]],
    code_ranges: Sequence[tuple[Addr, Addr]],
) -> tuple[str, ...]:
    """Unmap address ranges that no text leads to, each as a whole.

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
    quiescent: set[int] = set()
    stacks: set[tuple[int, int]] = set()
    holders: tuple[int, ...] = ()
    try:
        for _ in range(MAX_TRIES):
            # A stack may have grown, a thread may have been born.
            target.read_maps()
            with target.stop() as stop:
                holders = _find_holders(target, stop, ranges, quiescent, stacks)
            if not holders:
                break
            time.sleep(TRY_EVERY_S)
        else:
            names = ", ".join(str(tid) for tid in holders)
            return (f"{name}: threads {names} may return into it, or hold an address in it",)
        for _ in range(MAX_SEARCHES):
            if not _find_switched_away(target, code_ranges, tuple(stacks)):
                break
            time.sleep(TRY_EVERY_S)
        else:
            return (f"{name}: memory of the program holds an address in it, perhaps a saved PC",)
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
    seen: set[int] = set()
    for pid, tid in stop.sleepers:
        seen.add(tid)
        if tid not in quiescent:
            sleeper = _find_quiescent_sleeper(target, pid, tid, ranges)
            if sleeper is not None:
                quiescent.add(tid)
                _add_stack(target, sleeper.sp, stacks)
    for thread in stop.stopped:
        seen.add(thread.tid)
        position = ThreadPosition(tid=thread.tid, pc=thread.pc, sp=thread.sp)
        _add_stack(target, position.sp, stacks)
        if thread.tid not in quiescent and _is_quiescent(target, position, ranges):
            quiescent.add(thread.tid)
    # Those of processes that share the memory are in the stop, too.
    seen.update(tid for tid in list_tids(target.pid) if not _is_dead(target.pid, tid))
    return tuple(sorted(seen - quiescent))


def _is_dead(pid: int, tid: int) -> bool:
    """Tell whether a thread runs no more, such as a first thread that has exited."""
    try:
        return read_state_char(pid, tid) in "ZX"
    except ProcessGone:
        return True


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
    """Note a mapping that is one thread's stack, so that dead frames in it do not count.

    The main stack, or a mapping of its own above a guard page as pthreads have it:
    anything else may hold other stacks below this one.
    """
    previous: Mapping | None = None
    for mapping in target.maps:
        if mapping.start <= sp < mapping.end:
            has_guard = (
                previous is not None
                and previous.end == mapping.start
                and previous.perms.startswith("---")
                and mapping.size <= MAX_STACK_SCAN_SIZE
            )
            if mapping.path == "[stack]" or has_guard:
                stacks.add((mapping.start, mapping.end))
        previous = mapping


def _find_quiescent_sleeper(
    target: Target, pid: int, tid: int, ranges: Sequence[tuple[Addr, Addr]]
) -> ThreadPosition | None:
    """Return where a sleeping thread is if it is quiescent, without stopping it.

    What was read counts only if the thread did not run meanwhile.
    """
    try:
        before = read_thread_state(pid, tid)
        if before.where is ThreadWhere.RUNNING:
            return None
        position = ThreadPosition(tid=tid, pc=before.pc, sp=before.sp)
        if not _is_quiescent(target, position, ranges):
            return None
        after = read_thread_state(pid, tid)
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
