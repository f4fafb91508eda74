# SPDX-License-Identifier: Apache-2.0
"""An API in memory, for tests of the command line."""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum

import numpy as np

from optpoline.cli.api import OnEvent, SessionSettings
from optpoline.controller.audit_report import AuditReport
from optpoline.controller.summary import (
    DeclaredSummary,
    DetachOutcome,
    DetachResult,
    KeySummary,
    LeftBehind,
    ModuleSummary,
    SessionState,
    SiteState,
    SiteSummary,
    StaticCallSummary,
    Summary,
    TargetShare,
)
from optpoline.controller.tracing import RecordPlan, RecordTotals
from optpoline.errors import OptpolineError, UsageError
from optpoline.simulate.trace import Burst, TracePair, TraceSite, TraceTarget
from optpoline.simulate.trace_file import TraceWriter

__all__ = [
    "FakeApi",
    "FakeEvent",
    "FakeKind",
    "FakeListing",
    "FakeProgram",
    "FakeSession",
    "make_site",
    "make_summary",
]


class FakeKind(Enum):
    """Kinds of event the fakes send."""

    ATTACHED = 1
    RELEARNED = 2
    PROMOTED = 3
    NOT_PROMOTED = 4
    NOTE = 5


@dataclass(frozen=True, slots=True)
class FakeEvent:
    """An event."""

    kind: FakeKind
    message: str


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeListing:
    """What find_sites returns."""

    modules: tuple[ModuleSummary, ...]
    sites: tuple[SiteSummary, ...] = ()
    notes: tuple[str, ...] = ()
    declared: tuple[DeclaredSummary, ...] = ()


def make_site(
    address: int = 0x401136,
    *,
    state: SiteState = SiteState.PROMOTED,
    refusal: str | None = None,
    function: str | None = "_ZN4Base3runEi+0x12",
) -> SiteSummary:
    """Return a site with two targets."""
    return SiteSummary(
        module="/usr/bin/lua",
        address=address,
        offset=address - 0x400000,
        function=function,
        kind="call",
        operand="rax",
        thunk="__x86_indirect_thunk_rax",
        state=state,
        refusal=refusal,
        hit_rate=0.9934,
        rate_hz=1.25e6,
        targets=(
            TargetShare(address=0x401200, function="luaV_execute", share=0.75, promoted=True),
            TargetShare(address=0x401300, function=None, share=0.25, promoted=False),
        ),
    )


def make_summary() -> Summary:
    """Return the summary of a session at work."""
    module = ModuleSummary(path="/usr/bin/lua", n_sites=2, n_refused=1, n_thunks=3, n_plain=None)
    return Summary(
        pid=4711,
        state=SessionState.WATCHING,
        modules=(module,),
        sites=(make_site(), make_site(0x401150, state=SiteState.REFUSED, refusal="it is odd")),
        promoted=1,
        hit_rate=0.9934,
        stops=3,
        stop_ms_max=0.31,
        stop_ms_total=0.9,
        learning_s=1.0,
        relearned=0,
        notes=(),
    )


@dataclass
class FakeSession:
    """A session; ``calls`` says what was done to it."""

    calls: list[str] = field(default_factory=list)
    errors: dict[str, OptpolineError] = field(default_factory=dict)
    on_watch: Callable[[threading.Event], SessionState] = lambda stop: SessionState.WATCHING
    before: Summary = field(default_factory=make_summary)
    result: DetachResult = field(
        default_factory=lambda: DetachResult(
            outcome=DetachOutcome.CLEAN, restored=1, foreign=(), notes=()
        )
    )
    totals: RecordTotals = field(
        default_factory=lambda: RecordTotals(
            n_sites=1,
            n_targets=1,
            n_bursts=1,
            n_branches=2,
            n_dropped=1,
            n_unknown=0,
            seconds=1e-6,
            is_gone=False,
            notes=("a note",),
        )
    )
    after_state: SessionState = SessionState.RESTORED
    detached: bool = False
    on_event: OnEvent = lambda event: None

    def _call(self, name: str, text: str) -> None:
        """Note a call, or fail as told."""
        self.calls.append(text)
        if name in self.errors:
            raise self.errors[name]

    def learn(self, *, seconds: float | None, stop: threading.Event, in_turn: bool = False) -> None:
        """Learn."""
        self._call("learn", "learn" if seconds is None else f"learn {seconds:g}")

    def promote(self) -> None:
        """Promote."""
        self._call("promote", "promote")
        self.on_event(FakeEvent(FakeKind.PROMOTED, "1 of 2 sites in 0.012 s"))

    def record(self, writer: TraceWriter, plan: RecordPlan, stop: threading.Event) -> RecordTotals:
        """Record one burst of two branches."""
        self._call("record", f"record {plan.seconds:g}")
        site = TraceSite(
            module="/usr/bin/lua", address=1, offset=1, function=None, kind="call", rate_hz=None
        )
        writer.add_tables([site], [TraceTarget(address=2, symbol=None)], [TracePair(0, 0)])
        writer.add_burst(
            Burst(
                start_ns=0,
                end_ns=1000,
                pairs=np.zeros(2, np.uint32),
                marks=np.zeros((0, 2), np.int64),
            )
        )
        return self.totals

    def watch(self, *, seconds: float | None, stop: threading.Event) -> SessionState:
        """Watch."""
        self._call("watch", "watch" if seconds is None else "watch limited")
        return self.on_watch(stop)

    def summary(self) -> Summary:
        """Summarize; restored sites are no longer promoted."""
        if not self.detached:
            return self.before
        return replace(self.before, state=self.after_state, promoted=0, sites=(), stops=4)

    def detach(self, *, leave: bool) -> DetachResult:
        """Detach."""
        self._call("detach", "leave" if leave else "detach")
        self.detached = True
        return replace(self.result, outcome=DetachOutcome.LEFT) if leave else self.result


@dataclass
class FakeHandle:
    """A key or a static call in a transaction; ``wanted`` is what will be done."""

    name: str
    wanted: dict[str, str]

    def enable(self) -> None:
        """Enable."""
        self.wanted[self.name] = "enable"

    def disable(self) -> None:
        """Disable."""
        self.wanted[self.name] = "disable"

    def reset(self) -> None:
        """Reset."""
        self.wanted[self.name] = "reset"

    def update(self, function: str, *, any_function: bool = False) -> None:
        """Redirect."""
        self.wanted[self.name] = function + (" of any type" if any_function else "")


@dataclass
class FakeTransaction:
    """A transaction."""

    program: FakeProgram
    wanted: dict[str, str] = field(default_factory=dict)

    def key(self, name: str) -> FakeHandle:
        """Return a key."""
        if name not in {key.name for key in self.program.keys}:
            raise UsageError(f"process 1 has no static key {name}")
        return FakeHandle(name, self.wanted)

    def static_call(self, name: str) -> FakeHandle:
        """Return a static call."""
        return FakeHandle(name, self.wanted)

    def commit(self) -> int:
        """Make the changes."""
        self.program.committed.append(self.wanted)
        return len(self.wanted)


@dataclass
class FakeProgram:
    """What a program declares."""

    keys: tuple[KeySummary, ...] = ()
    static_calls: tuple[StaticCallSummary, ...] = ()
    committed: list[dict[str, str]] = field(default_factory=list)
    timeout_s: float | None = None
    is_closed: bool = False

    def transaction(self, *, timeout_s: float) -> FakeTransaction:
        """Begin a transaction."""
        self.timeout_s = timeout_s
        return FakeTransaction(self)

    def close(self) -> None:
        """Close."""
        self.is_closed = True


@dataclass
class FakeApi:
    """An API."""

    session: FakeSession = field(default_factory=FakeSession)
    attach_errors: list[OptpolineError] = field(default_factory=list)
    attached: list[int] = field(default_factory=list)
    listing: FakeListing | None = None
    left: LeftBehind | None = None
    left_late: LeftBehind | None = None
    report: AuditReport | None = None
    restore_error: OptpolineError | None = None
    found: list[int | str] = field(default_factory=list)
    program: FakeProgram = field(default_factory=lambda: FakeProgram())
    restored_settings: bool = False

    def attach(self, pid: int, *, settings: SessionSettings, on_event: OnEvent) -> FakeSession:
        """Attach."""
        self.attached.append(pid)
        if self.attach_errors:
            raise self.attach_errors.pop(0)
        self.session.on_event = on_event
        on_event(FakeEvent(FakeKind.ATTACHED, "2 sites in 1 module"))
        on_event(FakeEvent(FakeKind.RELEARNED, "relearned one site"))
        return self.session

    def find_sites(self, target: int | str) -> FakeListing:
        """List sites."""
        self.found.append(target)
        assert self.listing is not None
        return self.listing

    def read_status(self, pid: int) -> LeftBehind | None:
        """Say what is left."""
        return self.left

    def wait_for_late_calls(self, pid: int) -> None:
        """Find what was left late."""
        self.left = self.left or self.left_late

    def audit(self, pid: int) -> AuditReport:
        """Verify."""
        assert self.report is not None
        return self.report

    def declared(self, pid: int) -> FakeProgram:
        """Open."""
        return self.program

    def restore(self, pid: int, *, settings: bool = False) -> DetachResult:
        """Restore."""
        self.restored_settings = settings
        if self.restore_error is not None:
            raise self.restore_error
        return self.session.result
