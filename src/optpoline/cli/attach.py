# SPDX-License-Identifier: Apache-2.0
"""``optpoline attach PID``: promote a running program until told to stop."""

from __future__ import annotations

import signal

import click

from optpoline.cli.drive import (
    EXIT_NOT_UNDONE,
    NOT_UNDONE,
    SessionPlan,
    describe_event,
    drive_session,
)
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import (
    PID,
    make_settings,
    pass_invocation,
    session_options,
    shared_options,
)
from optpoline.cli.signals import SignalRelay
from optpoline.controller.arguments import Change
from optpoline.report.json_document import session_document
from optpoline.report.session_text import format_summary

__all__ = ["attach_command"]

_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


@click.command("attach")
@click.argument("pid", type=PID)
@session_options
@shared_options
@pass_invocation
def attach_command(
    invocation: Invocation,
    pid: int,
    duration: float | None,
    learn_seconds: float | None,
    max_stop_ms: float,
    policy: str,
    policy_set: tuple[str, ...],
    follow_fork: bool,
    shared_counters: bool,
    promote_plain: bool,
    change: Change,
    leave: bool,
    no_progress: bool,
) -> None:
    """Promote a running program; Ctrl-C restores it.

    It ends with Ctrl-C, after --duration, or when the program exits. Then every
    byte is put back, unless --leave is given.
    """
    invocation.progress = not no_progress
    invocation.sink.validate_writable()
    settings = make_settings(
        learn_seconds=learn_seconds,
        max_stop_ms=max_stop_ms,
        policy=policy,
        policy_set=policy_set,
        follow_fork=follow_fork,
        shared_counters=shared_counters,
        promote_plain=promote_plain,
        change=change,
    )
    plan = SessionPlan(settings=settings, duration_s=duration, leave=leave)
    console = invocation.console()
    with SignalRelay(stopping=_SIGNALS) as relay:
        session = invocation.api.attach(pid, settings=settings, on_event=describe_event(console))
        end = drive_session(session, plan, relay.stop, console)
        received = relay.received
    console.say_all(format_summary(end.summary, console.style, verbose=console.verbose))
    invocation.sink.write(session_document(end.summary, end.detach, command="attach"))
    # Ctrl-C is the ordinary way to end this; the other signals show in the status.
    if end.detach.outcome in NOT_UNDONE:
        invocation.exit_code = EXIT_NOT_UNDONE
    elif received is not None and received != signal.SIGINT:
        invocation.exit_code = 128 + received
