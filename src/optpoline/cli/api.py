# SPDX-License-Identifier: Apache-2.0
"""The part of the public API that the command line is written on, as a seam.

Subcommands see these protocols only, so that unit tests can stand in for a
target. ``LiveApi`` is the real thing; it imports optpoline when first used,
because ``optpoline --help`` needs none of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Protocol

from optpoline.controller.arguments import Change
from optpoline.controller.audit_report import AuditReport
from optpoline.controller.summary import (
    DeclaredSummary,
    DetachResult,
    KeySummary,
    LeftBehind,
    ModuleSummary,
    SessionState,
    SiteSummary,
    StaticCallSummary,
    Summary,
)
from optpoline.errors import PermissionDenied, TargetFault, UnsupportedTarget

if TYPE_CHECKING:
    import optpoline
    from optpoline.controller.tracing import RecordPlan, RecordTotals
    from optpoline.simulate.trace_file import TraceWriter

__all__ = [
    "Api",
    "DeclaredHandle",
    "KeyHandle",
    "LiveApi",
    "OnEvent",
    "SessionEvent",
    "SessionHandle",
    "SessionSettings",
    "SiteListing",
    "StaticCallHandle",
    "TransactionHandle",
]


class SessionEvent(Protocol):
    """Something a session did (``optpoline.Event``)."""

    @property
    def kind(self) -> Enum:
        """What happened; the member's name is what counts."""

    @property
    def message(self) -> str:
        """One sentence for people."""


OnEvent = Callable[[SessionEvent], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionSettings:
    """What the user may set of a session (``optpoline.Config``).

    Attributes:
        learn_s: Length of the first learning window in seconds; None: as suits how many sites
            there are.
        max_stop_s: How long the program's threads may stand while its text is changed.
        follow_fork: Restore its forked children at the end as well.
        shared_counters: Count in one row that all CPUs share.
        promote_plain: Promote plain branches that no source declares as well.
        change: How a promoted site is changed.
        policy: Name of the policy.
        policy_settings: Thresholds of it by name, each as the user wrote it.
    """

    learn_s: float | None = None
    max_stop_s: float = 0.005
    follow_fork: bool = False
    shared_counters: bool = False
    promote_plain: bool = False
    change: Change = "swap"
    policy: str = "adaptive"
    policy_settings: tuple[tuple[str, str], ...] = ()


class SessionHandle(Protocol):
    """An attached session (``optpoline.Session``)."""

    def learn(
        self, *, seconds: float | None, stop: threading.Event, in_turn: bool = False
    ) -> object:
        """Count targets for a window; None: for as long as the settings say."""

    def promote(self) -> object:
        """Promote what was learned."""

    def record(self, writer: TraceWriter, plan: RecordPlan, stop: threading.Event) -> RecordTotals:
        """Record what was learned, branch by branch."""

    def watch(self, *, seconds: float | None, stop: threading.Event) -> SessionState:
        """Keep up until the time is over, ``stop`` is set, or the target is gone."""

    def summary(self) -> Summary:
        """Say how things are."""

    def detach(self, *, leave: bool) -> DetachResult:
        """Restore everything, or leave the promotions working."""


class SiteListing(Protocol):
    """The sites of a process or file (``optpoline.SiteReport``)."""

    @property
    def modules(self) -> tuple[ModuleSummary, ...]:
        """Every module searched."""

    @property
    def sites(self) -> tuple[SiteSummary, ...]:
        """Every site found."""

    @property
    def declared(self) -> tuple[DeclaredSummary, ...]:
        """Everything that the source declares."""

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences worth telling."""


class KeyHandle(Protocol):
    """A static key in a transaction (``optpoline.KeyHandle``)."""

    def enable(self) -> None:
        """Enable it."""

    def disable(self) -> None:
        """Disable it."""

    def reset(self) -> None:
        """Make it what it begins as."""


class StaticCallHandle(Protocol):
    """A static call in a transaction (``optpoline.StaticCallHandle``)."""

    def update(self, function: str, *, any_function: bool = False) -> None:
        """Let it call another function."""

    def reset(self) -> None:
        """Let it call what it called at first."""


class TransactionHandle(Protocol):
    """Changes that are made at once (``optpoline.Transaction``)."""

    def key(self, name: str) -> KeyHandle:
        """Return a static key."""

    def static_call(self, name: str) -> StaticCallHandle:
        """Return a static call."""

    def commit(self) -> int:
        """Make the changes."""


class DeclaredHandle(Protocol):
    """The static calls and keys of a program (``optpoline.DeclaredProgram``)."""

    @property
    def keys(self) -> tuple[KeySummary, ...]:
        """Every static key."""

    @property
    def static_calls(self) -> tuple[StaticCallSummary, ...]:
        """Every static call."""

    def transaction(self, *, timeout_s: float) -> TransactionHandle:
        """Begin a transaction."""

    def close(self) -> None:
        """Release what we hold."""


class Api(Protocol):
    """What the subcommands call."""

    def attach(self, pid: int, *, settings: SessionSettings, on_event: OnEvent) -> SessionHandle:
        """Attach to a process, or raise an error of ``optpoline.errors``."""

    def find_sites(self, target: int | str) -> SiteListing:
        """List the sites of a process or file without touching it."""

    def read_status(self, pid: int) -> LeftBehind | None:
        """Say what an earlier controller left in a process."""

    def wait_for_late_calls(self, pid: int) -> None:
        """Wait until what an earlier controller had a process do is done, if we may stop it."""

    def audit(self, pid: int) -> AuditReport:
        """Verify what controllers did to a process."""

    def restore(self, pid: int, *, settings: bool = False) -> DetachResult:
        """Undo what an earlier controller left in a process, and settings if asked to."""

    def declared(self, pid: int) -> DeclaredHandle:
        """Open a process to change its static calls and keys."""


class LiveApi:
    """The real API."""

    def attach(
        self, pid: int, *, settings: SessionSettings, on_event: OnEvent
    ) -> optpoline.Session:
        """Attach to a process."""
        import optpoline
        from optpoline.promote.policies import policy_named

        config = optpoline.Config(
            learn_s=settings.learn_s,
            max_stop_s=settings.max_stop_s,
            follow_fork=settings.follow_fork,
            shared_counters=settings.shared_counters,
            promote_plain=settings.promote_plain,
            change=settings.change,
            policy=policy_named(settings.policy, dict(settings.policy_settings)),
        )
        return optpoline.attach(pid, config=config, on_event=on_event)

    def find_sites(self, target: int | str) -> optpoline.SiteReport:
        """List the sites of a process or file."""
        import optpoline

        return optpoline.find_sites(target)

    def read_status(self, pid: int) -> LeftBehind | None:
        """Say what an earlier controller left in a process; explain it if we may not see."""
        import optpoline
        from optpoline.process.permissions import check_attachable

        try:
            return optpoline.read_status(pid)
        except TargetFault:
            check_attachable(pid)
            raise

    def wait_for_late_calls(self, pid: int) -> None:
        """Wait until what an earlier controller had a process do is done, if we may stop it."""
        from optpoline.controller.late_calls import wait_for_late_calls_of

        # A debugger that has it now has stopped its threads since; that nothing was left can
        # be told all the same.
        with suppress(PermissionDenied, UnsupportedTarget):
            wait_for_late_calls_of(pid)

    def audit(self, pid: int) -> AuditReport:
        """Verify what controllers did to a process; explain it if we may not see."""
        import optpoline
        from optpoline.process.permissions import check_attachable

        try:
            return optpoline.audit(pid)
        except TargetFault:
            check_attachable(pid)
            raise

    def restore(self, pid: int, *, settings: bool = False) -> DetachResult:
        """Undo what an earlier controller left in a process, and settings if asked to."""
        import optpoline

        return optpoline.restore(pid, settings=settings)

    def declared(self, pid: int) -> optpoline.DeclaredProgram:
        """Open a process to change its static calls and keys."""
        import optpoline

        return optpoline.declared(pid)
