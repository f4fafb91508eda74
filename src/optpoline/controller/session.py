# SPDX-License-Identifier: Apache-2.0
"""A session: attach, learn, promote, keep up, let go.

The command line is written on this class alone. All of its methods must be
called from one thread, because ptrace calls must come from one OS thread.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping as MappingABC
from dataclasses import replace

from optpoline.controller.arguments import validate_pid, validate_setting
from optpoline.controller.config import Config
from optpoline.controller.events import EventKind
from optpoline.controller.hot_sites import ALL_AT_ONCE_SITES
from optpoline.controller.late_calls import wait_for_late_calls
from optpoline.controller.letting_go import let_go
from optpoline.controller.lifeline import Lifeline
from optpoline.controller.lock import ControllerLock
from optpoline.controller.no_sites import no_sites_error
from optpoline.controller.parts import Parts, make_parts
from optpoline.controller.records import SiteRecord
from optpoline.controller.session_declared import DeclaringSession
from optpoline.controller.standing import EventCallback, Standing
from optpoline.controller.summaries import summarise
from optpoline.controller.summary import (
    DetachOutcome,
    DetachResult,
    SessionState,
    SiteState,
    Summary,
)
from optpoline.controller.takeover import find_left, restore_left
from optpoline.controller.target import Target
from optpoline.controller.tracing import RecordPlan, RecordTotals, record_trace
from optpoline.controller.watch import Watch
from optpoline.controller.wording import count_of
from optpoline.errors import OptpolineError, UsageError
from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Module, Site
from optpoline.process.permissions import check_attachable
from optpoline.simulate.trace_file import TraceWriter

__all__ = ["Session", "attach"]


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
        self._standing = Standing(on_event)
        self._lock: ControllerLock | None = None
        self._target: Target | None = None
        self._lifeline: Lifeline | None = None
        self._parts: Parts | None = None
        self._watch: Watch | None = None
        self._last_summary: Summary | None = None

    # --- attaching

    def open(self) -> None:
        """Check, lock, undo what was left, find sites, make arenas."""
        check_attachable(self.pid)
        self._lock = ControllerLock(self.pid)
        self._lifeline = Lifeline(self.pid, self._standing)
        target = Target(
            self.pid,
            stop_timeout_s=self.config.stop_timeout_s,
            max_stop_s=self.config.max_stop_s,
            has_cpu_rows=not self.config.shared_counters,
        )
        self._target = target
        wait_for_late_calls(target)
        if find_left(self.pid) is not None:
            result = restore_left(self.pid, stop_timeout_s=self.config.stop_timeout_s)
            restored = count_of(result.restored, "site")
            self._standing.note(f"found what an earlier controller left: restored {restored}")
            for note in result.notes:
                self._standing.note(note)
        parts = make_parts(self.config, target, self._lifeline, self._standing)
        self._parts = parts
        parts.inventory.take_in()
        if not self.sites:
            raise no_sites_error(self.pid, tuple(target.modules.values()))
        self._watch = Watch(
            self.config,
            target,
            lifeline=parts.lifeline,
            standing=self._standing,
            inventory=parts.inventory,
            learning=parts.learning,
            promotion=parts.promotion,
            upkeep=parts.upkeep,
        )
        n_modules = sum(1 for loaded in target.modules.values() if loaded.scan.sites)
        message = f"{count_of(len(self.sites), 'site')} in {count_of(n_modules, 'module')}"
        self._standing.tell(EventKind.ATTACHED, message)

    # --- properties

    @property
    def target(self) -> Target:
        """The process; only between ``open`` and ``detach``."""
        if self._target is None:
            raise OptpolineError(f"the session with process {self.pid} is over")
        return self._target

    @property
    def state(self) -> SessionState:
        """What the session does, or how it ended."""
        return self._standing.state

    @property
    def notes(self) -> list[str]:
        """What its user has to know, a sentence each."""
        return self._standing.notes

    def _check_open(self) -> None:
        """Raise the error of ``target`` if the session is over."""
        _ = self.target

    @property
    def _work(self) -> Parts:
        """The parts that do the work; from ``open`` on."""
        assert self._parts is not None
        return self._parts

    @property
    def records(self) -> list[SiteRecord]:
        """What is known of all sites found, refused ones included."""
        return [] if self._parts is None else self._parts.inventory.records

    @property
    def learning_s(self) -> float:
        """Seconds during which any site led to a learning block."""
        return 0.0 if self._parts is None else self._parts.window.learning_s

    @property
    def modules(self) -> tuple[Module, ...]:
        """Modules mapped in the target."""
        return tuple(loaded.module for loaded in self.target.modules.values())

    @property
    def sites(self) -> tuple[Site, ...]:
        """All sites found, refused ones included."""
        return tuple(site for loaded in self.target.modules.values() for site in loaded.scan.sites)

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
            seconds: Length of the window; None for ``Config.learn_s``.
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
        if seconds is not None:
            validate_setting("seconds", seconds)
        baseline = [r for r in self.records if r.state is SiteState.BASELINE]
        if seconds is None:
            is_hot_only = len(baseline) > ALL_AT_ONCE_SITES
            seconds = self.config.first_window_s(is_hot_only=is_hot_only)
        self._work.learning.learn(baseline, seconds, stop, in_turn=in_turn)

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
        self._check_open()
        return self._work.counts.drain(list(self._work.window.ever_linked.values()))

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
        return self._work.promotion.promote()

    def record(
        self, writer: TraceWriter, plan: RecordPlan, stop: threading.Event | None = None
    ) -> RecordTotals:
        """Record what the sites that were learned do, branch by branch, in bursts."""
        return record_trace(
            self.records,
            writer,
            plan,
            target=self.target,
            pause=self._work.lifeline.sleep,
            stop=stop,
        )

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
        assert self._watch is not None
        return self._watch.run(seconds, stop)

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
            reclaim=self._work.upkeep.summary(),
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
                end = None
                if result.outcome is DetachOutcome.GONE:
                    end = self._work.lifeline.find_end(target)
                    if end is None:
                        # Only a thread was gone: the program has to be let go all the same.
                        result = let_go(target, self.records, leave=leave)
                self._standing.state = SessionState.after(result.outcome)
                if result.outcome is DetachOutcome.GONE and end is not None:
                    self._standing.state = end
            except BaseException:
                self.close()
                raise
        may_restore = not leave and result.outcome is not DetachOutcome.GONE
        children, notes = self._work.children.let_go(may_restore=may_restore)
        result = replace(result, children=children, notes=(*result.notes, *notes))
        self.notes.extend(result.notes)
        if result.outcome in (DetachOutcome.CLEAN, DetachOutcome.GONE):
            self._work.names.remove()
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
        if self._parts is not None:
            self._parts.close()
        self._close_settings()
        if self._target is not None:
            self._target.close()
            self._target = None
        if self._lifeline is not None:
            self._lifeline.close()
        self._unlock()

    def _unlock(self) -> None:
        """Let others attach."""
        if self._lock is not None:
            self._lock.release()
            self._lock = None

    def __enter__(self) -> Session:
        """Return the session."""
        return self

    def __exit__(self, *_: object) -> None:
        """Detach, restoring everything, unless that was done."""
        try:
            if self._target is not None:
                self.detach()
        finally:
            # Ctrl-C may come in there as well: whoever goes on can attach again all the same.
            self._unlock()
