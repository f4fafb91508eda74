# SPDX-License-Identifier: Apache-2.0
"""A session: attach, learn, promote, keep up, let go.

The command line is written on this class alone. All of its methods must be
called from one thread, because ptrace calls must come from one OS thread.
"""

from __future__ import annotations

import math
import os
import select
import threading
import time
from collections.abc import Callable, Sequence
from collections.abc import Mapping as MappingABC
from dataclasses import replace
from types import TracebackType

from optpoline.controller.arguments import validate_pid, validate_setting
from optpoline.controller.children import Children
from optpoline.controller.collector import collector_paused
from optpoline.controller.config import LEARN_S, Config
from optpoline.controller.events import Event, EventKind
from optpoline.controller.exact_counts import ExactCounts, describe_operation
from optpoline.controller.executor import OperationEvent
from optpoline.controller.first_window import FirstWindow
from optpoline.controller.hot_sites import ALL_AT_ONCE_SITES, FIRST_HOT_S, HotSites
from optpoline.controller.learning import MIN_FREE_CODE_SIZE
from optpoline.controller.letting_go import let_go
from optpoline.controller.linker import Linker
from optpoline.controller.lock import ControllerLock
from optpoline.controller.no_sites import no_sites_error
from optpoline.controller.not_promoted import explain_not_promoted, find_unlinked
from optpoline.controller.perf_map import PerfMap
from optpoline.controller.promotion import (
    FIRST_SLACK_RATIO,
    NEXT_SLACK_RATIO,
    promote_again,
    promote_first,
)
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.rediscovery import Rediscovery
from optpoline.controller.sampling import Sampler
from optpoline.controller.session_declared import DeclaringSession
from optpoline.controller.settling import OFF_PAUSE_S, Settler
from optpoline.controller.summaries import summarise
from optpoline.controller.summary import (
    DetachOutcome,
    DetachResult,
    ReclaimSummary,
    SessionState,
    SiteState,
    Summary,
)
from optpoline.controller.tables import Tables
from optpoline.controller.takeover import find_left, restore_left
from optpoline.controller.target import Target
from optpoline.controller.tracing import RecordPlan, RecordTotals, record_trace
from optpoline.controller.wording import count_of
from optpoline.errors import (
    ArenaError,
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    StopTimeout,
    TargetFault,
    UnsupportedTarget,
    UsageError,
)
from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Mapping, Module, Site
from optpoline.process.permissions import check_attachable
from optpoline.simulate.trace_file import TraceWriter

__all__ = ["Session", "attach"]

EventCallback = Callable[[Event], None]

_MORE_S = 0.1
"""How much longer than asked for a watch may take to end a change that is under way: a grace
period takes 5 to 50 ms where the first look tells all."""

_PASSING = (ArenaError, PermissionDenied, StopTimeout, TargetFault, UnsupportedTarget)
"""Errors that say no more than that something cannot be done for the moment."""

_EXIT_POLL_S = 0.01
_EXIT_TIMEOUT_S = 5.0
"""How long a killed program may take to free its memory; then it counts as exited."""


def attach(
    pid: int, *, config: Config | None = None, on_event: EventCallback | None = None
) -> Session:
    """Attach to a running process and find its sites; nothing is changed yet.

    What an earlier controller left in it is undone first.

    Args:
        pid: The process.
        config: Settings; None for the defaults.
        on_event: Called with what happens, never while the target is stopped.

    Raises:
        UsageError: if ``pid`` is no whole number from 1 up.
        ProcessGone: if there is no such process.
        PermissionDenied: if we may not trace it.
        UnsupportedTarget: if it is of a kind we do not handle.
        NoSites: if it has no retpoline site.
        ControllerActive: if another controller works on it.
        ArenaError: if no arena can be placed within reach.
    """
    session = Session(validate_pid(pid), config=config, on_event=on_event)
    try:
        session.open()
    except BaseException:
        session.abandon()
        raise
    return session


class Session(DeclaringSession):
    """One controller's work on one process; make it with ``attach``."""

    def __init__(
        self, pid: int, *, config: Config | None = None, on_event: EventCallback | None = None
    ) -> None:
        """Prepare; ``open`` does the work."""
        self.pid = pid
        self.config = config or Config()
        self.state = SessionState.ATTACHED
        self.records: list[SiteRecord] = []
        self.notes: list[str] = []
        self._on_event = on_event
        self._lock: ControllerLock | None = None
        self._target: Target | None = None
        self._linker: Linker | None = None
        self._window: FirstWindow | None = None
        self._sampler: Sampler | None = None
        self._hot: HotSites | None = None
        self._rediscovery: Rediscovery | None = None
        self._children: Children | None = None
        self._tables = Tables()
        self._reclaimer: Reclaimer | None = None
        self._settler: Settler | None = None
        self._counts: ExactCounts | None = None
        self._perf_map: PerfMap | None = None
        self._pidfd = -1
        self._last_summary: Summary | None = None
        self._next_maps_s = 0.0
        self._code_seen: tuple[Mapping, ...] = ()
        """What could be executed when modules were last looked for."""
        self._n_changes_named = 0

    # --- attaching

    def open(self) -> None:
        """Check, lock, undo what was left, find sites, make arenas."""
        check_attachable(self.pid)
        self._lock = ControllerLock(self.pid)
        try:
            self._pidfd = os.pidfd_open(self.pid)
        except OSError as error:
            raise ProcessGone(self.pid) from error
        if find_left(self.pid) is not None:
            result = restore_left(self.pid, stop_timeout_s=self.config.stop_timeout_s)
            restored = count_of(result.restored, "site")
            self._note(f"found what an earlier controller left: restored {restored}")
            for note in result.notes:
                self._note(note)
        target = Target(
            self.pid,
            stop_timeout_s=self.config.stop_timeout_s,
            max_stop_s=self.config.max_stop_s,
            has_cpu_rows=not self.config.shared_counters,
        )
        self._target = target
        self._linker = Linker(target)
        self._children = Children(target, follow=self.config.follow_fork)
        self._counts = ExactCounts(target, self._children, self._tell_operation)
        self._window = FirstWindow(
            self.config,
            target,
            self._linker,
            sleep=self._sleep,
            after_look=self._name_blocks,
            empty=self._counts.empty,
        )
        self._hot = HotSites(target)
        self._reclaimer = Reclaimer(self.config, target, self._children, self._keep_counts)
        self._settler = Settler(self.config, self._reclaimer)
        change = self._settler.change if self.config.is_switched_off else promote_again
        self._sampler = Sampler(self.config, self._linker, target.may_guard, self._tables, change)
        self._rediscovery = Rediscovery(self._hot, self._sampler.jump_misses_hz, time.monotonic())
        self._perf_map = PerfMap(self.pid, target.symbol_at)
        self._add_modules()
        if not self.sites:
            raise no_sites_error(self.pid, tuple(target.modules.values()))
        self._next_maps_s = time.monotonic() + self.config.maps_every_s
        n_modules = sum(1 for loaded in target.modules.values() if loaded.scan.sites)
        message = f"{count_of(len(self.sites), 'site')} in {count_of(n_modules, 'module')}"
        self._tell(EventKind.ATTACHED, message)

    def _add_modules(self) -> list[SiteRecord]:
        """Take in modules that were loaded since the last look; return their records."""
        with collector_paused():
            return self._take_in()

    def _take_in(self) -> list[SiteRecord]:
        """Do so; thousands of objects are made that all stay."""
        self.target.read_maps()
        self._code_seen = self.target.code_maps
        added, gone = self.target.refresh_modules()
        for loaded in gone:
            self._forget(loaded.module)
        fresh: list[SiteRecord] = []
        refused: list[tuple[Module, ArenaError]] = []
        for loaded in added:
            try:
                fresh += self.target.make_records(loaded)
            except ArenaError as error:
                refused.append((loaded.module, error))
        self.records += fresh
        if fresh or gone:
            assert self._hot is not None
            self._hot.use(self.records)
            self._tables.use(self.records)
        for why in self.target.unread.values():
            if why not in self.notes:
                self._note(why)
        if refused and not self.records and self.state is SessionState.ATTACHED:
            raise refused[0][1]
        for module, reason in refused:
            self._note(f"{module.path} left alone: {reason}")
        return fresh

    def _forget(self, module: Module) -> None:
        """Drop records of a module that was unmapped; its text is gone with it."""
        kept = [r for r in self.records if not module.start <= r.site.addr < module.end]
        if len(kept) != len(self.records):
            self.records = kept
            self._first_window.forget(module.start, module.end)
            if self._settler is not None:
                self._settler.forget(module.start, module.end)
            self._tell(EventKind.MODULE_GONE, f"{module.path} was unloaded")

    # --- properties

    @property
    def target(self) -> Target:
        """The process; only between ``open`` and ``detach``."""
        if self._target is None:
            raise OptpolineError(f"the session with process {self.pid} is over")
        return self._target

    def _check_open(self) -> None:
        """Raise the error of ``target`` if the session is over."""
        _ = self.target

    @property
    def _first_window(self) -> FirstWindow:
        """The first windows; from ``open`` on."""
        assert self._window is not None
        return self._window

    @property
    def learning_s(self) -> float:
        """Seconds during which any site led to a learning block."""
        return 0.0 if self._window is None else self._window.learning_s

    @property
    def modules(self) -> tuple[Module, ...]:
        """Modules mapped in the target."""
        return tuple(loaded.module for loaded in self.target.modules.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites found, refused ones included."""
        return tuple(site for loaded in self.target.modules.values() for site in loaded.scan.sites)

    def _tell(self, kind: EventKind, message: str) -> None:
        """Tell the caller what happened."""
        if self._on_event is not None:
            self._on_event(Event(kind=kind, message=message, time_ns=time.monotonic_ns()))

    def _tell_operation(self, event: OperationEvent) -> None:
        """Tell that counters were drained."""
        self._tell(EventKind.OPERATION, describe_operation(event))
        note = "counts may be inexact: somebody came between while they were drained"
        if not event.is_exclusive and note not in self.notes:
            self._note(note)

    def _note(self, message: str) -> None:
        """Keep a sentence for the summary, and tell it."""
        self.notes.append(message)
        self._tell(EventKind.NOTE, message)

    # --- learning and promoting

    def learn(
        self,
        seconds: float | None = None,
        stop: threading.Event | None = None,
        *,
        in_turn: bool = False,
    ) -> None:
        """Count the targets of the sites that are not promoted, for a while.

        Where there are more than ``ALL_AT_ONCE_SITES`` of them, of those that run: more
        windows follow while the session watches.

        Args:
            seconds: Length of the window; None for ``Config.learn_s``. Its default becomes
                ``FIRST_HOT_S`` where only those that run are learned.
            stop: Ends the window early when set.
            in_turn: Whether many sites (``first_window.GROUP_SITES``) may count in groups, one
                after the other, each for its part of the window: the program is slowed down
                less. Then ``promote`` decides on all of them, and ``drain`` knows the last group
                only.

        Raises:
            OptpolineError: if the session is over.
            ProcessGone: if the target exits meanwhile.
            UsageError: if ``seconds`` is no number from 0 up.
        """
        self._check_open()
        length_s = self.config.learn_s if seconds is None else seconds
        validate_setting("seconds", length_s)
        baseline = [r for r in self.records if r.state is SiteState.BASELINE]
        if length_s == LEARN_S and len(baseline) > ALL_AT_ONCE_SITES:
            length_s = FIRST_HOT_S
        self._learn(baseline, length_s, stop, in_turn=in_turn)

    def _learn(
        self,
        records: list[SiteRecord],
        length_s: float,
        stop: threading.Event | None,
        *,
        in_turn: bool,
    ) -> None:
        """Run one first window over baseline sites: all of them, or those that run."""
        if len(records) > ALL_AT_ONCE_SITES:
            self._learn_hot([], length_s, stop)
            return

        def began(n_sites: int) -> None:
            self._tell_learning(count_of(n_sites, "site"), length_s)

        self._first_window.learn(records, length_s, stop, in_turn=in_turn, began=began)

    def _learn_hot(
        self, records: list[SiteRecord], length_s: float, stop: threading.Event | None
    ) -> None:
        """Run one first window over some sites, and those that are met in it."""
        assert self._hot is not None
        with self._hot.watch() as lookout:
            linked = self._first_window.link(records)
            what = count_of(len(linked), "site") if linked else "the sites that run"
            self._tell_learning(what, length_s)
            try:
                self._first_window.run(linked, length_s, stop, lookout)
            except ProcessGone:
                self._sleep(0.0)  # notes that it has exited
                raise

    def _tell_learning(self, what: str, length_s: float) -> None:
        """Say that a window begins."""
        self.state = SessionState.LEARNING
        self._tell(EventKind.LEARNING, f"learning {what} for {length_s:g} s")

    def _sleep(self, seconds: float) -> None:
        """Sleep, or raise ``ProcessGone`` as soon as the target exits."""
        readable, _, _ = select.select([self._pidfd], [], [], max(0.0, seconds))
        if readable:
            self.state = SessionState.EXITED
            raise ProcessGone(self.pid)

    def drain(self) -> MappingABC[Addr, SiteCounts]:
        """Return what each site has counted since the last drain, exactly, and begin anew.

        After ``learn`` sites go on counting until ``promote``, each branch once, at full
        speed but for the counting: a profile of any stretch of time, as often as wanted,
        also where the hardware records no branches. Forked children count with the program.
        Promoted sites count only while they are re-sampled.

        Nothing stops for it where our threads may run on the CPUs that the program's do
        (docs/operations.md); what could not be had this time comes with a later drain.

        Returns:
            For the address of each site that has counted anything: its targets, hottest
            first, and how many branches found no slot.

        Raises:
            OptpolineError: if the session is over.
            ProcessGone: if the target has to be stopped for it, and is gone.
        """
        if self._counts is None:
            raise OptpolineError(f"the session with process {self.pid} is over")
        return self._counts.drain(list(self._first_window.ever_linked.values()))

    def _keep_counts(self, site_addr: Addr, block_addr: Addr) -> None:
        """Keep what a block has counted whose memory is about to be given back."""
        record = self._first_window.ever_linked.get(site_addr)
        if record is not None and self._counts is not None:
            self._counts.keep(record, block_addr)

    def promote(self) -> int:
        """Promote what the last window found worth it; the rest gets its baseline back.

        Returns:
            How many sites were promoted.

        Raises:
            OptpolineError: if the session is over.
            UsageError: if nothing was learned before.
        """
        self._check_open()
        if self.state is SessionState.ATTACHED:
            hint = "call learn() before promote()"
            raise UsageError(f"nothing was learned yet of process {self.pid}", hint=hint)
        assert self._linker is not None
        assert self._sampler is not None
        assert self._rediscovery is not None
        linked = list(self._first_window.ever_linked.values())
        learned = [r for r in linked if r.home is not None and r.active is None and r.off is None]
        waiting, self._first_window.waiting = self._first_window.waiting, []
        learned += [r for r in waiting if r.home is None]
        idle = self._tables.find_idle(learned)
        begin_s = time.monotonic()
        try:
            n_promoted = promote_first(
                [*learned, *idle],
                policy=self.config.policy,
                linker=self._linker,
                may_guard=self.target.may_guard,
                now_s=begin_s,
                promote_plain=self.config.promote_plain,
                slack_ratio=NEXT_SLACK_RATIO if self.config.is_switched_off else FIRST_SLACK_RATIO,
                tables=self._tables,
            )
        finally:
            by_table = [r for r in idle if r.state is SiteState.PROMOTED]
            self._first_window.ever_linked.update((r.site.addr, r) for r in by_table)
            for record in learned:
                if record.state is SiteState.LEARNING:
                    record.state = SiteState.BASELINE
        self.state = SessionState.PROMOTED
        try:
            self._tell_promoted(n_promoted, [*learned, *by_table], time.monotonic() - begin_s)
        finally:
            self._sampler.schedule(self._first_window.ever_linked.values(), time.monotonic())
            self._rediscovery.learned(learned, time.monotonic())
            self._name_blocks(at_once=True)
        return n_promoted

    def _tell_promoted(self, n_promoted: int, learned: Sequence[SiteRecord], took_s: float) -> None:
        """Say what became of the sites that were learned."""
        if n_promoted:
            message = f"{n_promoted} of {count_of(len(learned), 'site')} in {took_s:.3f} s"
            self._tell(EventKind.PROMOTED, message)
            return
        more = any(record.state is SiteState.PROMOTED for record in self.records)
        tried = self._first_window.ever_linked.values()
        why = explain_not_promoted(
            self.pid,
            learned,
            find_unlinked(tried, learned),
            promote_plain=self.config.promote_plain,
        )
        message = f"nothing {'more ' if more else ''}to promote yet: {why}"
        self._tell(EventKind.NOT_PROMOTED, message)

    def record(
        self, writer: TraceWriter, plan: RecordPlan, stop: threading.Event | None = None
    ) -> RecordTotals:
        """Record what the sites that were learned do, branch by branch, in bursts."""
        return record_trace(
            self.records, writer, plan, target=self.target, pause=self._sleep, stop=stop
        )

    def _name_blocks(self, *, at_once: bool = False) -> None:
        """Let profilers know the blocks by name."""
        assert self._perf_map is not None
        arenas, now_s = self.target.arenas, time.monotonic()
        n_changes = sum(arena.n_changes for arena in arenas)
        if n_changes == self._n_changes_named or not (at_once or self._perf_map.is_due(now_s)):
            return
        self._n_changes_named = n_changes
        blocks = [block for arena in arenas for block in arena.blocks]
        note = self._perf_map.update(blocks, now_s)
        if note is not None:
            self._note(note)

    # --- keeping up

    def watch(
        self, seconds: float | None = None, stop: threading.Event | None = None
    ) -> SessionState:
        """Keep up with the workload until time is over, told to stop, or the target is gone.

        Args:
            seconds: How long; None for no limit.
            stop: Ends the watch when set.

        Returns:
            WATCHING if it ended because of ``seconds`` or ``stop``, else EXITED or EXECED.

        Raises:
            OptpolineError: if the session is over.
            UsageError: if ``seconds`` is no number from 0 up.
        """
        self._check_open()
        if seconds is not None:
            validate_setting("seconds", seconds)
        self.state = SessionState.WATCHING
        end_s = None if seconds is None else time.monotonic() + seconds
        assert self._sampler is not None
        assert self._settler is not None
        try:
            while self.state is SessionState.WATCHING and not (stop is not None and stop.is_set()):
                now_s = time.monotonic()
                left_s = math.inf if end_s is None else end_s - now_s
                is_any_off = self._settler.is_any_off
                if left_s <= (-_MORE_S if is_any_off else 0.0):
                    break
                pause_s = OFF_PAUSE_S if is_any_off else self._sampler.pause_s(now_s)
                self._watch_once(pause_s if left_s <= 0.0 else min(pause_s, left_s), stop)
        finally:
            if self._settler.end():
                self._sampler.settled(self._first_window.ever_linked.values(), (), time.monotonic())
        return self.state

    def _watch_once(self, pause_s: float, stop: threading.Event | None) -> None:
        """Wait, do what is due, and notice the end of the program."""
        try:
            self._sleep(pause_s)
            self._step(time.monotonic(), stop)
        except ProcessGone:
            end = self._find_end()
            self.state = SessionState.WATCHING if end is None else end
            if end is SessionState.EXECED:
                self._tell(EventKind.EXECED, f"process {self.pid} replaced its program")
            elif end is SessionState.EXITED:
                self._tell(EventKind.EXITED, f"process {self.pid} exited")
        except _PASSING as error:
            # For the moment it cannot be done; every site leads somewhere right meanwhile.
            self.state = SessionState.WATCHING
            if str(error) not in self.notes:
                self._note(str(error))

    def _find_end(self) -> SessionState | None:
        """Return how the program that we attached to ended, by exit or by exec.

        None if it runs on: what was gone was one of its threads.
        """
        end_s = time.monotonic() + _EXIT_TIMEOUT_S
        while time.monotonic() < end_s:
            # A killed program may be on its way out for a while; its exit shows here.
            if select.select([self._pidfd], [], [], _EXIT_POLL_S)[0]:
                return SessionState.EXITED
            if self.target.is_replaced():
                return SessionState.EXECED
        return None if self.target.memory.is_current() else SessionState.EXITED

    def _step(self, now_s: float, stop: threading.Event | None) -> bool:
        """Do what is due; tell whether there is still something to watch."""
        assert self._sampler is not None
        assert self._reclaimer is not None
        assert self._settler is not None
        linked = self._first_window.ever_linked.values()
        # First of all, so that no site stays switched off because something else fails.
        n_settled = self._settler.step(linked, now_s)
        changed = self._settler.take_changed()
        if n_settled or changed:
            self._sampler.settled(linked, changed, now_s)
            self._tell_relearned(len(changed))
        # Before the rest, so that an arena that is used up gets room whatever fails below.
        self._reclaimer.step(linked, self._sampler.spares, now_s)
        due = self._sampler.poll(linked, now_s)
        if due:
            n_again, n_demoted = self._sampler.sample(due)
            self._tell_relearned(n_again)
            if n_demoted:
                self._tell(EventKind.DEMOTED, f"{count_of(n_demoted, 'site')} back on the thunk")
        self._sampler.relink(linked, now_s, self._settler.is_settling)
        self._name_blocks()
        if self._settler.is_any_off:
            return True  # and let nothing that takes long come in between
        self._rediscover(time.monotonic(), stop)
        if now_s >= self._next_maps_s:
            self._next_maps_s = now_s + self.config.maps_every_s
            self._note_used_up()
            return self._check_maps(stop)
        return True

    def _tell_relearned(self, n_again: int) -> None:
        """Say how many sites were promoted anew, and which way if not the one asked for."""
        if not n_again:
            return
        assert self._settler is not None
        reasons = "; ".join(self._settler.take_reasons())
        swapped = f", swapped: {reasons}" if reasons else ""
        self._tell(EventKind.RELEARNED, f"{count_of(n_again, 'site')} promoted anew{swapped}")

    def _note_used_up(self) -> None:
        """Say once that an arena has no room for further changes."""
        for arena in self.target.arenas:
            note = (
                f"the arena at {arena.addr:#x} is used up: its sites keep working as they are, "
                "changes of the workload are followed no more; attach anew for an empty one"
            )
            if arena.free_code_size < MIN_FREE_CODE_SIZE and note not in self.notes:
                self._note(note)

    def _rediscover(self, now_s: float, stop: threading.Event | None) -> None:
        """Learn the sites anew that time is spent for in thunks."""
        assert self._rediscovery is not None
        found = self._rediscovery.find(now_s)
        if not found:
            return
        self._learn_and_promote(lambda: self._learn_hot(found, self.config.relearn_s, stop))

    def _learn_and_promote(self, learn: Callable[[], None]) -> None:
        """Learn while watching, and decide on it."""
        try:
            learn()
        except _PASSING:
            # Sites may still count: nobody else comes back to them, nor to what was learned.
            self.promote()
            raise
        self.promote()
        self.state = SessionState.WATCHING

    def _check_maps(self, stop: threading.Event | None) -> bool:
        """Notice exec and new modules; tell whether the program is still the same."""
        self.target.read_maps()
        if self.target.code_maps == self._code_seen:
            return True
        if not self.target.has_arena():
            self.state = SessionState.EXECED
            self._tell(EventKind.EXECED, f"process {self.pid} replaced its program")
            return False
        fresh = self._add_modules()
        if fresh:
            names = ", ".join(sorted({record.site.module for record in fresh}))
            self._tell(EventKind.MODULE_ADDED, f"{names}: {count_of(len(fresh), 'site')}")
            self._learn_and_promote(
                lambda: self._learn(fresh, self.config.learn_s, stop, in_turn=True)
            )
        return True

    # --- telling

    def summary(self) -> Summary:
        """Return how things stand; after ``detach``, how they stood at the end."""
        if self._target is None:
            if self._last_summary is None:
                raise OptpolineError(f"process {self.pid} was never attached to")
            return self._last_summary
        return summarise(
            self._target,
            self.records,
            state=self.state,
            learning_s=self.learning_s,
            notes=tuple(self.notes),
            reclaim=self._reclaimer.summary() if self._reclaimer else ReclaimSummary(),
        )

    # --- letting go

    def detach(self, *, leave: bool = False) -> DetachResult:
        """Put every site's baseline back and unmap the arenas; then the session is over.

        Args:
            leave: Leave promoted sites promoted, working without us.
        """
        target = self.target
        if self.state in (SessionState.EXITED, SessionState.EXECED):
            result = DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())
        else:
            try:
                result = let_go(target, self.records, leave=leave)
                if result.outcome is DetachOutcome.GONE and (end := self._find_end()) is None:
                    # Only a thread was gone: the program has to be let go all the same.
                    result = let_go(target, self.records, leave=leave)
                self.state = SessionState.after(result.outcome)
                if result.outcome is DetachOutcome.GONE and end is not None:
                    self.state = end
            except BaseException:
                self.close()
                raise
        if self._children is not None:
            may_restore = not leave and result.outcome is not DetachOutcome.GONE
            children, notes = self._children.let_go(may_restore=may_restore)
            result = replace(result, children=children, notes=(*result.notes, *notes))
        self.notes += result.notes
        gone = (DetachOutcome.CLEAN, DetachOutcome.GONE)
        if self._perf_map is not None and result.outcome in gone:
            self._perf_map.remove()
        self._last_summary = self.summary()
        self.close()
        return result

    def abandon(self) -> None:
        """Undo what an attach that failed has done so far, as far as that is possible."""
        try:
            if self._target is not None and self._target.arenas:
                let_go(self._target, self.records, leave=False)
        except OptpolineError:
            pass  # the error that made the attach fail is the one to tell
        finally:
            self.close()

    def close(self) -> None:
        """Release what this process holds; the target is not touched."""
        if self._counts is not None:
            self._counts.close()
            self._counts = None
        if self._children is not None:
            self._children.close()
        if self._perf_map is not None:
            self._perf_map.close()
        self._close_settings()
        if self._target is not None:
            self._target.close()
            self._target = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1
        self._unlock()

    def _unlock(self) -> None:
        """Let others attach."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Session:
        """Return the session."""
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        """Detach, restoring everything, unless that was done."""
        try:
            if self._target is not None:
                self.detach()
        finally:
            # Ctrl-C may come in there as well: whoever goes on can attach again all the same.
            self._unlock()
