# SPDX-License-Identifier: Apache-2.0
"""One session from a completed attach to its end: learn, promote, keep up, let go.

Whatever happens in between, an error, a signal, the end of the target, the
session is detached exactly once, and what was promoted until then is still
known afterwards.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from optpoline.cli.api import SessionEvent, SessionHandle, SessionSettings
from optpoline.cli.console import Console
from optpoline.controller.arguments import LEARN_S
from optpoline.controller.summary import DetachOutcome, DetachResult, SessionState, Summary
from optpoline.errors import OptpolineError, ProcessGone
from optpoline.report.session_text import format_progress

__all__ = [
    "EXIT_NOT_UNDONE",
    "NOT_UNDONE",
    "SessionEnd",
    "SessionPlan",
    "describe_event",
    "drive_session",
]

PROGRESS_PERIOD_S = 1.0
"""How often the progress line is renewed; without one the session is left alone."""

NOT_UNDONE = frozenset({DetachOutcome.FOREIGN_BYTES, DetachOutcome.INCOMPLETE})
"""Ways of letting go after which some sites still lead into an arena."""

EXIT_NOT_UNDONE = 7

_OVER = frozenset({SessionState.EXITED, SessionState.EXECED})

_EVENT_PREFIXES = {
    "ATTACHED": "attached: ",
    "LEARNING": "",
    "PROMOTED": "promoted ",
    "NOT_PROMOTED": "",
    "MODULE_ADDED": "loaded ",
    "EXITED": "",
    "EXECED": "",
    "NOTE": "note: ",
}
"""Kinds of event that are always told, and what their line starts with. Scripts wait for
"promoted ", which is said only where something was; the kinds that are not here are told with
``--verbose``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionPlan:
    """What the user asked for.

    Attributes:
        settings: Settings of the session.
        duration_s: When to let go, in seconds from now, or None for no such limit.
        leave: Whether the promotions are to go on working without us.
    """

    settings: SessionSettings
    duration_s: float | None
    leave: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SessionEnd:
    """How a session ended.

    Attributes:
        summary: Sites and rates as they were last, state and stops as they are now.
        detach: What letting go did.
    """

    summary: Summary
    detach: DetachResult


def describe_event(console: Console) -> Callable[[SessionEvent], None]:
    """Return the callback that tells the user what a session does."""

    def tell(event: SessionEvent) -> None:
        prefix = _EVENT_PREFIXES.get(event.kind.name)
        if prefix is None:
            console.say_more(event.message)
        else:
            console.say(prefix + event.message.removeprefix(prefix))

    return tell


def drive_session(
    session: SessionHandle,
    plan: SessionPlan,
    stop: threading.Event,
    console: Console,
    clock: Callable[[], float] = time.monotonic,
) -> SessionEnd:
    """Run a session to its end and detach.

    Args:
        session: Just attached; the duration counts from here.
        plan: What to do.
        stop: Ends the session at the next opportunity.
        console: Where the user is told.
        clock: Seconds that only go forward.

    Returns:
        How it ended; also after an error, told then, if not all could be put back.

    Raises:
        OptpolineError: if learning, promoting or detaching failed; what had
            been changed was put back first.
    """
    is_gone = False
    notes: tuple[str, ...] = ()
    try:
        notes = _keep_promoted(session, plan, stop, console, clock)
    except ProcessGone:
        is_gone = True
    except OptpolineError as error:
        left = _roll_back(session, console)
        if left is None:
            raise
        console.error(error.message, error.hint)
        return _with_notes(left, (error.message,))
    except BaseException:
        _roll_back(session, console)
        raise
    finally:
        console.close_progress()
    return _with_notes(_let_go(session, plan.leave, is_gone=is_gone), notes)


def _keep_promoted(
    session: SessionHandle,
    plan: SessionPlan,
    stop: threading.Event,
    console: Console,
    clock: Callable[[], float],
) -> tuple[str, ...]:
    """Learn, promote, and keep up until it is time to let go; return what to note of it."""
    started = clock()
    limit_s = plan.duration_s

    def remaining_s() -> float | None:
        return None if limit_s is None else max(0.0, limit_s - (clock() - started))

    window_s = plan.settings.learn_s
    planned_s = LEARN_S if window_s is None else window_s
    if limit_s is not None and not plan.leave and limit_s < planned_s:
        window_s = limit_s
    if window_s != 0 and not stop.is_set():
        _show_progress(session, console, clock() - started)
        session.learn(seconds=window_s, stop=stop, in_turn=True)
    # Too little time to promote for; but what is to be left has to be made first.
    if stop.is_set():
        return ()
    if remaining_s() == 0 and not plan.leave:
        return (
            f"nothing was promoted: the duration of {limit_s:g} s was over with the first learning "
            f"window, which takes {planned_s:g} s (--learn-seconds)",
        )
    session.promote()
    while not stop.is_set():
        left_s = remaining_s()
        if left_s == 0:
            break
        if not console.has_progress:
            slice_s = left_s
        else:
            _show_progress(session, console, clock() - started)
            slice_s = PROGRESS_PERIOD_S if left_s is None else min(PROGRESS_PERIOD_S, left_s)
        if session.watch(seconds=slice_s, stop=stop) in _OVER or slice_s is None:
            break
    return ()


def _roll_back(session: SessionHandle, console: Console) -> SessionEnd | None:
    """Restore after an error; return what is left, None if that is nothing to be told of."""
    try:
        result = session.detach(leave=False)
    except ProcessGone:
        return None
    except OptpolineError as error:
        console.error(f"restoring failed: {error.message}", error.hint)
        return None
    if result.outcome not in NOT_UNDONE:
        return None
    return SessionEnd(summary=session.summary(), detach=result)


def _with_notes(end: SessionEnd, notes: tuple[str, ...]) -> SessionEnd:
    """Add what is worth telling of a session's course to its summary."""
    notes = tuple(note for note in notes if note not in end.summary.notes)
    return replace(end, summary=replace(end.summary, notes=(*notes, *end.summary.notes)))


def _let_go(session: SessionHandle, leave: bool, *, is_gone: bool) -> SessionEnd:
    """Detach, and join what was known before with what is known after."""
    before = session.summary()
    try:
        result = session.detach(leave=leave)
    except ProcessGone:
        is_gone = True
        result = DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())
    after = session.summary()
    state = after.state
    if state not in _OVER:
        if is_gone or result.outcome is DetachOutcome.GONE:
            state = SessionState.EXITED
        elif result.outcome is DetachOutcome.LEFT:
            state = SessionState.LEFT
    # Restored sites are no longer promoted; the report is about what they were.
    summary = replace(
        before,
        state=state,
        stops=after.stops,
        stop_ms_max=after.stop_ms_max,
        stop_ms_total=after.stop_ms_total,
        stops_over_limit=after.stops_over_limit,
        learning_s=after.learning_s,
        notes=(*after.notes, *(note for note in result.notes if note not in after.notes)),
    )
    return SessionEnd(summary=summary, detach=result)


def _show_progress(session: SessionHandle, console: Console, elapsed_s: float) -> None:
    """Renew the progress line; a summary is not free, so only if there is one."""
    if console.has_progress:
        console.progress(format_progress(session.summary(), elapsed_s))
