# SPDX-License-Identifier: Apache-2.0
"""``optpoline run -- CMD ARGS``: start a program and promote it for its lifetime.

We are a guest of the program: what it prints, its exit status and its signals
are its own. A program that cannot be promoted runs on as it is.
"""

from __future__ import annotations

import signal
from dataclasses import replace

import click

from optpoline.cli.child import Child, Image
from optpoline.cli.console import Console
from optpoline.cli.drive import SessionEnd, SessionPlan, describe_event, drive_session
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import (
    make_settings,
    pass_invocation,
    session_options,
    shared_options,
)
from optpoline.cli.signals import SignalRelay
from optpoline.controller.arguments import Change
from optpoline.controller.summary import SessionState, Summary
from optpoline.errors import NoSites, OptpolineError, ProcessGone
from optpoline.report.json_document import session_document
from optpoline.report.session_text import format_summary

__all__ = ["run_command", "start_child"]

# As env(1), time(1) and timeout(1) do; their 125 is set where the verb is known, in main.
EXIT_NOT_EXECUTABLE = 126
EXIT_NOT_FOUND = 127

TOO_SHORT = "the program ended before it could be attached to"

NOT_FOLLOWED = (
    "it runs on as it is; what it starts is not followed: put `optpoline run --` before that"
)
"""The remedy where the program is a shell or a launcher."""

_RELAYED = (signal.SIGINT, signal.SIGQUIT, signal.SIGTERM, signal.SIGHUP)


@click.command("run", context_settings={"allow_interspersed_args": False})
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED, metavar="CMD [ARGS]...")
@session_options
@shared_options
@pass_invocation
def run_command(
    invocation: Invocation,
    command: tuple[str, ...],
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
    """Start CMD and promote its hot sites for its lifetime.

    Its exit status is passed on (128+n if signal n ended it). 125: optpoline
    itself failed before CMD ran; 126: CMD cannot be executed; 127: there is no
    such CMD.
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
    child = Child(command)
    # Caught before the child exists, so that no signal falls between; those caught are
    # back to their defaults in the child, those ignored stay ignored.
    with SignalRelay(relayed=_RELAYED, relay=child.relay) as relay:
        start_child(invocation, child, relay)
        console = invocation.console()
        promotion = _Promotion(invocation, child, relay, console)
        promotion.keep_promoted(plan)
        summary = promotion.summary()
        # The session may be over long before the program is.
        if promotion.end is not None:
            console.say_all(format_summary(summary, console.style, verbose=console.verbose))
        status = child.wait_status()
    detach = None if promotion.end is None else promotion.end.detach
    invocation.sink.write(session_document(summary, detach, command="run", exit_status=status))
    invocation.exit_code = status


class _Promotion:
    """The sessions with one child: one for each program it executes."""

    def __init__(
        self, invocation: Invocation, child: Child, relay: SignalRelay, console: Console
    ) -> None:
        """Have no session yet."""
        self.end: SessionEnd | None = None
        self._invocation = invocation
        self._child = child
        self._relay = relay
        self._console = console
        self._notes: list[str] = []

    def keep_promoted(self, plan: SessionPlan) -> None:
        """Promote the child until it exits or the time is over."""
        while (image := self._child.wait_settled()) is not None:
            end = self._hold_session(plan, image)
            if end is None:
                continue
            self.end = end
            if end.summary.state is not SessionState.EXECED:
                return
            self._note("the program replaced itself (exec); this is about what came last")
        if self.end is None and not self._notes:
            self._console.say(f"not promoted: {TOO_SHORT}")
            self._note(TOO_SHORT)

    def summary(self) -> Summary:
        """Return the last session's summary, or one that says why there was none."""
        if self.end is None:
            return Summary(
                pid=self._child.pid,
                state=SessionState.EXITED,
                modules=(),
                sites=(),
                promoted=0,
                hit_rate=None,
                stops=0,
                stop_ms_max=0.0,
                stop_ms_total=0.0,
                learning_s=0.0,
                relearned=0,
                notes=tuple(self._notes),
            )
        return _with_notes(self.end.summary, self._notes)

    def _hold_session(self, plan: SessionPlan, image: Image) -> SessionEnd | None:
        """Attach and stay until the end; None if the child is worth another look later."""
        try:
            session = self._invocation.api.attach(
                self._child.pid,
                settings=plan.settings,
                on_event=describe_event(self._console),
            )
            return drive_session(session, plan, self._relay.stop, self._console)
        except ProcessGone:
            return None
        except NoSites as error:
            self._tell_no_sites(error)
        except OptpolineError as error:
            self._console.error(f"the program runs on unpromoted: {error.message}", error.hint)
            self._note(str(error))
        # A wrapper may execute the real program, a loader may map a library with sites.
        self._child.wait_changed(image)
        return None

    def _tell_no_sites(self, error: NoSites) -> None:
        """Say what the program has instead; what that means, once of all that it executes."""
        self._console.say(f"not promoted: {error.message}")
        if error.hint and not any(error.hint in note for note in self._notes):
            self._console.say(f"  {error.hint}")
        if not self._notes:
            self._console.say(f"  {NOT_FOLLOWED}")
        self._note(f"{error}; {NOT_FOLLOWED}")

    def _note(self, text: str) -> None:
        """Keep a sentence for the report."""
        if text not in self._notes:
            self._notes.append(text)


def start_child(invocation: Invocation, child: Child, relay: SignalRelay) -> None:
    """Start the child, or raise with the exit code that says why not."""
    name = child.command[0]
    try:
        child.start(relay.request_stop)
    except (FileNotFoundError, NotADirectoryError) as error:
        invocation.failure_exit_code = EXIT_NOT_FOUND
        raise OptpolineError(f"{name}: no such program") from error
    except OSError as error:
        invocation.failure_exit_code = EXIT_NOT_EXECUTABLE
        raise OptpolineError(f"{name} cannot be executed: {error.strerror}") from error


def _with_notes(summary: Summary, notes: list[str]) -> Summary:
    """Add our notes to a session's."""
    return replace(summary, notes=(*notes, *summary.notes))
