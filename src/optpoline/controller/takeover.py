# SPDX-License-Identifier: Apache-2.0
"""See and undo what an earlier controller left in a process.

All that is needed is read from the program's own memory: arenas are found by
their name in the memory map, each one's journal says which sites it was linked
to and what their bytes were. That works without the earlier controller's files
and without its privileges.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace

from optpoline.controller.arguments import validate_pid
from optpoline.controller.declared_program import DeclaredProgram
from optpoline.controller.declared_settings import read_settings
from optpoline.controller.kept import describe_kept, find_children
from optpoline.controller.late_calls import wait_for_late_calls_of
from optpoline.controller.left_arenas import (
    LeftArena,
    find_arena_files,
    find_arenas,
    is_controller_alive,
)
from optpoline.controller.letting_go import unmap_or_say_why
from optpoline.controller.lock import ControllerLock
from optpoline.controller.perf_map import remove_perf_map
from optpoline.controller.poking import poke_patiently
from optpoline.controller.summary import DetachOutcome, DetachResult, LeftBehind
from optpoline.controller.target import Target
from optpoline.controller.wording import count_of
from optpoline.errors import ControllerActive, NotesError
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import (
    Poke,
    is_same_but_disp,
    leads_into,
    read_entries,
)
from optpoline.patch.used_code import find_used_code
from optpoline.process.memory import RemoteMemory
from optpoline.process.permissions import (
    check_attachable,
    open_program,
)
from optpoline.process.procfs import read_maps
from optpoline.process.stop import Wake
from optpoline.x86.syscalls import SYS_CLOSE

__all__ = ["find_left", "read_status", "restore", "restore_left"]


_NOTHING = "nothing was left"


def _close_files(target: Target) -> None:
    """Close descriptors that a controller left in the target."""
    if not find_arena_files(target.pid):
        return
    with target.stop(Wake.ONE_FOR_INJECTION) as stop:
        for number in find_arena_files(target.pid):
            stop.inject(SYS_CLOSE, number)


@dataclass(frozen=True, slots=True, kw_only=True)
class _FoundSite:
    """A journalled site as it is now.

    Attributes:
        entry: Its entry.
        code: The bytes there; fewer where its module is gone.
        state: "patched", "baseline" or "foreign".
    """

    entry: JournalEntry
    code: bytes
    state: str


def _find_sites(memory: RemoteMemory, arena: LeftArena) -> list[_FoundSite]:
    """Look at each journalled site of an arena."""
    found = read_entries(memory, arena.entries)
    sites: list[_FoundSite] = []
    for entry in arena.entries:
        code = found[entry.addr]
        if code == entry.code:
            state = "baseline"
        elif leads_into(entry, code, arena.start, arena.end) and is_same_but_disp(entry, code):
            state = "patched"
        else:
            state = "foreign"
        sites.append(_FoundSite(entry=entry, code=code, state=state))
    return sites


def _is_hidden(site: _FoundSite, arena: LeftArena) -> bool:
    """Tell whether a site with foreign bytes would lead into the arena without them."""
    return site.state == "foreign" and leads_into(site.entry, site.code, arena.start, arena.end)


def read_status(pid: int) -> LeftBehind | None:
    """Return what a controller left, or is doing, in a process; None if nothing.

    Nothing is stopped and nothing is written. What keys and static calls were set to is
    told as well.

    Raises:
        UsageError: if ``pid`` is no whole number from 1 up.
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: if it has no program of our kind: a kernel thread, for one.
        PermissionDenied: if its memory may not be read.
    """
    left = find_left(pid)
    with RemoteMemory(pid) as memory:
        settings = read_settings(memory)
    if left is not None or not settings:
        return None if left is None else replace(left, settings=settings)
    return LeftBehind(
        pid=pid,
        controller_pid=0,
        controller_alive=False,
        arenas=0,
        sites=0,
        baseline=0,
        foreign=0,
        site_addresses=(),
        settings=settings,
    )


def find_left(pid: int) -> LeftBehind | None:
    """Return what a controller left of its arenas and promotions; None if nothing.

    Nothing is stopped and nothing is written. What a call that is still to come will leave is
    not told: ``wait_for_late_calls`` comes before that.

    Raises:
        UsageError: if ``pid`` is no whole number from 1 up.
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: if it has no program of our kind: a kernel thread, for one.
        PermissionDenied: if its memory may not be read.
    """
    with open_program(validate_pid(pid)) as memory:
        arenas = find_arenas(memory, read_maps(pid))
        if not arenas and not find_arena_files(pid):
            return None
        sites: list[tuple[int, str]] = []
        for arena in arenas:
            sites += [(int(s.entry.addr), s.state) for s in _find_sites(memory, arena)]
    states = [state for _, state in sites]
    headers = [arena.header for arena in arenas if arena.header is not None]
    return LeftBehind(
        pid=pid,
        controller_pid=headers[0].controller_pid if headers else 0,
        controller_alive=any(is_controller_alive(header) for header in headers),
        arenas=len(arenas),
        sites=states.count("patched"),
        baseline=states.count("baseline"),
        foreign=states.count("foreign"),
        site_addresses=tuple(sorted(sites)),
    )


def _check_nobody_works(pid: int, arenas: Sequence[LeftArena]) -> None:
    """Refuse to undo the work of a controller that still runs.

    The lock does not tell where it was taken in another network namespace. A forked
    child's arenas name its parent as their target: those may be undone.

    Raises:
        ControllerActive: if one does.
    """
    for arena in arenas:
        header = arena.header
        if header is None or header.target_pid != pid or header.controller_pid == os.getpid():
            continue
        if is_controller_alive(header):
            raise ControllerActive(
                f"another optpoline controller, process {header.controller_pid}, works on "
                f"process {pid}",
                hint=f"end that one first (kill {header.controller_pid})",
            )


def restore(pid: int, *, stop_timeout_s: float = 2.0, settings: bool = False) -> DetachResult:
    """Undo what an earlier controller left in a process, as ``optpoline detach`` does.

    Static keys and calls stay as they were set; what a controller that was killed has left
    half changed is finished.

    Args:
        pid: The process.
        stop_timeout_s: How long its threads may take to stop.
        settings: Make static keys and calls what they begin as, too.

    Raises:
        UsageError: if ``pid`` is no whole number from 1 up.
        ProcessGone: if there is no such process.
        PermissionDenied: if we may not trace it.
        ControllerActive: if a controller still works on it.
        StopTimeout: if its threads could not be stopped, or one hangs in a call that a killed
            controller put it on.
        SiteChanged: if somebody else's bytes are at a branch on a key, or a static call.
        TransactionTimeout: if keys or calls have to be changed, and threads were in the way.
        NotesError: if they are to be put back, and a module's notes cannot be read; all else is
            undone.
    """
    check_attachable(validate_pid(pid))
    lock = ControllerLock(pid)
    try:
        wait_for_late_calls_of(pid, stop_timeout_s=stop_timeout_s)
        result = restore_left(pid, stop_timeout_s=stop_timeout_s)
        return _with_settings(pid, result, stop_timeout_s, is_reset=settings)
    finally:
        lock.release()


def _with_settings(
    pid: int, result: DetachResult, stop_timeout_s: float, *, is_reset: bool
) -> DetachResult:
    """Put keys and static calls right, or back, and say what stays set.

    Raises:
        SiteChanged: if somebody else's bytes are at a site.
        TransactionTimeout: if threads were in the way all the time.
        NotesError: if they are to be put back, and a module's notes cannot be read.
    """
    target = Target(pid, stop_timeout_s=stop_timeout_s)
    program = DeclaredProgram(target)
    try:
        n_finished = program.finish()
        n_reset = program.reset() if is_reset else 0
        settings = read_settings(target.memory)
    except NotesError as error:
        if is_reset:
            raise
        return replace(result, notes=(*result.notes, str(error)))
    finally:
        target.close()
    notes = result.notes
    if n_finished or n_reset or settings:
        notes = tuple(note for note in notes if note != _NOTHING)
    if n_finished:
        notes += (f"finished {count_of(n_finished, 'change')} of static keys and calls",)
    if n_reset:
        notes += (f"{count_of(n_reset, 'setting')} put back to what the program begins with",)
    if settings:
        notes += (f"set, and left so: {', '.join(settings)}",)
    return replace(result, notes=notes)


def restore_left(pid: int, *, stop_timeout_s: float) -> DetachResult:
    """Undo what an earlier controller left.

    The caller holds the target's lock, and has waited for calls that are still to come.

    Raises:
        ProcessGone: if there is no such process.
        StopTimeout: if its threads could not be stopped.
    """
    target = Target(pid, stop_timeout_s=stop_timeout_s)
    try:
        arenas = find_arenas(target.memory, target.maps)
        _check_nobody_works(pid, arenas)
        _close_files(target)
        result = DetachResult(
            outcome=DetachOutcome.CLEAN, restored=0, foreign=(), notes=(_NOTHING,)
        )
        if arenas:
            result = _with_children(pid, _restore(target, arenas), arenas)
        if result.outcome is DetachOutcome.CLEAN:
            remove_perf_map(pid)
        return result
    finally:
        target.close()


def _with_children(pid: int, result: DetachResult, arenas: Sequence[LeftArena]) -> DetachResult:
    """Add what a program's forked children keep: undoing it in them is up to the user."""
    # A child finds arenas that were made for its parent, which is not what it left.
    own = [arena for arena in arenas if arena.header and arena.header.target_pid == pid]
    children = tuple(
        child
        for child in find_children(
            pid,
            frozenset(arena.parts[0].inode for arena in own),
            [entry for arena in own for entry in arena.entries],
            [(arena.start, arena.end) for arena in own],
        )
        if child.kept != 0
    )
    notes = (*result.notes, *describe_kept(children))
    return replace(result, children=children, notes=notes)


def _find_stuck(
    memory: RemoteMemory, pokes: Sequence[Poke], arenas: Sequence[LeftArena]
) -> list[Poke]:
    """Return the pokes whose sites lead into an arena now, whatever became of them."""
    found = read_entries(memory, [poke.entry for poke in pokes])
    return [
        poke
        for poke in pokes
        if any(
            leads_into(poke.entry, found[poke.entry.addr], arena.start, arena.end)
            for arena in arenas
        )
    ]


def _restore(target: Target, arenas: Sequence[LeftArena]) -> DetachResult:
    """Undo what can be read; an arena of another version is that version's to undo."""
    unreadable = [arena for arena in arenas if arena.header is None and arena.has_code]
    result = _restore_readable(target, [arena for arena in arenas if arena not in unreadable])
    if not unreadable:
        return result
    note = f"the arena at {unreadable[0].start:#x} was made by another version of optpoline"
    is_foreign = result.outcome is DetachOutcome.FOREIGN_BYTES
    return replace(
        result,
        outcome=result.outcome if is_foreign else DetachOutcome.INCOMPLETE,
        notes=(*result.notes, note),
    )


def _restore_readable(target: Target, arenas: Sequence[LeftArena]) -> DetachResult:
    """Put baselines back and unmap."""
    pokes: list[Poke] = []
    hidden: list[int] = []
    for arena in arenas:
        for site in _find_sites(target.memory, arena):
            entry = site.entry
            if site.state == "patched":
                now = entry.changed_of(site.code)
                pokes.append(Poke(entry=entry, expected=now, new=entry.original))
            elif _is_hidden(site, arena):
                hidden.append(int(entry.addr))
    restored = 0
    if pokes:
        result = poke_patiently(target, pokes)
        restored = len(result.done)
        # A module that was unloaded in the last moment has left nothing to restore.
        stuck = _find_stuck(target.memory, pokes, arenas) if restored < len(pokes) else []
        if stuck:
            foreign = tuple(int(p.entry.addr) for p in result.foreign if p in stuck)
            note = f"{len(stuck)} sites could not be restored; their arenas stay mapped"
            return DetachResult(
                outcome=DetachOutcome.FOREIGN_BYTES if foreign else DetachOutcome.INCOMPLETE,
                restored=restored,
                foreign=foreign,
                notes=(note,),
            )
    if hidden:
        note = "another patcher's bytes lie over sites that lead into an arena; it stays mapped"
        return DetachResult(
            outcome=DetachOutcome.FOREIGN_BYTES,
            restored=restored,
            foreign=tuple(hidden),
            notes=(note,),
        )
    ranges = [(arena.start, arena.end) for arena in arenas]
    code_ranges = [
        find_used_code(target.memory, arena.start, arena.header)
        for arena in arenas
        if arena.header is not None
    ]
    notes = unmap_or_say_why(target, ranges, code_ranges)
    return DetachResult(
        outcome=DetachOutcome.ARENA_LEFT if notes else DetachOutcome.CLEAN,
        restored=restored,
        foreign=(),
        notes=notes,
    )
