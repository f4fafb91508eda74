# SPDX-License-Identifier: Apache-2.0
"""How a session stands: its state, and what its caller was told and has to know.

All that works for a session tells its caller through this, and nothing else does.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from optpoline.controller.events import Event, EventKind
from optpoline.controller.summary import SessionState

__all__ = ["EventCallback", "Standing"]

EventCallback = Callable[[Event], None]


class Standing:
    """State and notes of one session.

    Args:
        on_event: Called with what happens; None if nobody listens.
    """

    def __init__(self, on_event: EventCallback | None = None) -> None:
        """Begin with a session that has attached, and nothing to know."""
        self._on_event = on_event
        self.state = SessionState.ATTACHED
        self.notes: list[str] = []
        """Sentences for the summary."""

    def tell(self, kind: EventKind, message: str) -> None:
        """Tell the caller what happened."""
        if self._on_event is not None:
            self._on_event(Event(kind=kind, message=message, time_ns=time.monotonic_ns()))

    def note(self, message: str) -> None:
        """Keep a sentence for the summary, and tell it."""
        self.notes.append(message)
        self.tell(EventKind.NOTE, message)

    def note_once(self, message: str) -> None:
        """Do so unless it was noted before."""
        if message not in self.notes:
            self.note(message)
