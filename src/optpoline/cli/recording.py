# SPDX-License-Identifier: Apache-2.0
"""The work of ``optpoline record``; apart from its options, which need no numpy."""

from __future__ import annotations

import shlex
import signal
from dataclasses import dataclass
from pathlib import Path

from optpoline.cli.api import SessionHandle, SessionSettings
from optpoline.cli.artifact import Artifact
from optpoline.cli.child import Child
from optpoline.cli.console import Console
from optpoline.cli.drive import EXIT_NOT_UNDONE, NOT_UNDONE, describe_event
from optpoline.cli.invocation import Invocation
from optpoline.cli.run import start_child
from optpoline.cli.signals import SignalRelay
from optpoline.controller.summary import DetachOutcome, DetachResult
from optpoline.controller.tracing import RecordPlan, RecordTotals
from optpoline.errors import NoSites, OptpolineError, ProcessGone
from optpoline.report.record_text import format_record
from optpoline.report.simulate_document import record_document
from optpoline.simulate.trace_file import TraceWriter

__all__ = ["Order", "make_order", "record_process", "record_program"]

EXIT_RUN_FAILED = 125

LEARN_SHARE = 0.25
"""Of the duration that learning may take."""

_STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_RELAYED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What is to be recorded, and where to.

    Attributes:
        artifact: The trace file.
        settings: Settings of the session.
        plan: What to record.
    """

    artifact: Artifact
    settings: SessionSettings
    plan: RecordPlan


def make_order(
    artifact: Artifact, *, duration_s: float, learn_s: float, burst_s: float, every_s: float
) -> Order:
    """Return an order; learning takes a part of the duration."""
    learn_s = min(learn_s, LEARN_SHARE * duration_s)
    return Order(
        artifact=artifact,
        settings=SessionSettings(learn_s=learn_s),
        plan=RecordPlan(seconds=duration_s - learn_s, burst_s=burst_s, every_s=every_s),
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _End:
    """How a recording ended."""

    totals: RecordTotals
    detach: DetachResult


def record_process(invocation: Invocation, pid: int, order: Order) -> None:
    """Record a process that runs already."""
    with SignalRelay(stopping=_STOPPING) as relay:
        end = _record(invocation, pid, order, relay, _name_of(pid))
        received = relay.received
    _report(invocation, pid, order, end, None)
    # As of attach: that sites still lead into an arena is more than how it was ended.
    if end.detach.outcome in NOT_UNDONE:
        invocation.exit_code = EXIT_NOT_UNDONE
    elif received is not None and received != signal.SIGINT:
        invocation.exit_code = 128 + received


def record_program(invocation: Invocation, command: tuple[str, ...], order: Order) -> None:
    """Start a program, record it, and pass its exit status on."""
    invocation.failure_exit_code = EXIT_RUN_FAILED
    child = Child(command)
    end: _End | None = None
    error: OptpolineError | None = None
    with SignalRelay(relayed=_RELAYED, relay=child.relay) as relay:
        start_child(invocation, child, relay)
        while end is None and error is None and (image := child.wait_settled()) is not None:
            try:
                end = _record(invocation, child.pid, order, relay, shlex.join(command))
            except ProcessGone:
                continue
            except NoSites:
                # A wrapper may execute the real program, a loader may map a library with sites.
                child.wait_changed(image)
            except OptpolineError as caught:
                error = caught
        if error is not None:
            invocation.console().error(f"not recorded: {error.message}", error.hint)
        status = child.wait_status()
    if end is None:
        if error is None:
            raise NoSites(f"{command[0]} ended before a site of it could be recorded")
        raise error
    _report(invocation, child.pid, order, end, status)
    invocation.exit_code = status


def _name_of(pid: int) -> str:
    """Return what people know a process by."""
    try:
        words = (Path("/proc") / str(pid) / "cmdline").read_bytes().split(b"\0")
    except OSError:
        words = []
    named = shlex.join(word.decode(errors="replace") for word in words if word)
    return named or f"process {pid}"


def _record(invocation: Invocation, pid: int, order: Order, relay: SignalRelay, name: str) -> _End:
    """Attach, record, let go; the trace appears if that went well."""
    console = invocation.console()
    session = invocation.api.attach(pid, settings=order.settings, on_event=describe_event(console))
    try:
        with order.artifact.open() as stream:
            writer = TraceWriter(stream, name)
            session.learn(seconds=order.settings.learn_s, stop=relay.stop)
            console.say(f"recording for {order.plan.seconds:g} s")
            totals = session.record(writer, order.plan, relay.stop)
            writer.finish()
    except BaseException:
        _roll_back(session, console)
        raise
    try:
        result = session.detach(leave=False)
    except ProcessGone:
        result = DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())
    # A command that was started may run on for long.
    console.say_all(format_record(order.artifact.path, totals, result))
    return _End(totals=totals, detach=result)


def _roll_back(session: SessionHandle, console: Console) -> None:
    """Restore after an error, which stays the one that is reported."""
    try:
        session.detach(leave=False)
    except ProcessGone:
        return
    except OptpolineError as error:
        console.error(f"restoring failed: {error.message}", error.hint)


def _report(invocation: Invocation, pid: int, order: Order, end: _End, status: int | None) -> None:
    """Write the document."""
    path = order.artifact.path
    invocation.sink.write(record_document(pid, path, end.totals, end.detach, status))
