# SPDX-License-Identifier: Apache-2.0
"""What a session tells while it works; never while the target is stopped."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

__all__ = ["Event", "EventKind"]


class EventKind(Enum):
    """What happened."""

    ATTACHED = "attached"
    LEARNING = "learning"
    PROMOTED = "promoted"
    NOT_PROMOTED = "not_promoted"
    """A learning window is over, and nothing was worth a promotion."""
    RELEARNED = "relearned"
    DEMOTED = "demoted"
    MODULE_ADDED = "module_added"
    MODULE_GONE = "module_gone"
    EXITED = "exited"
    EXECED = "execed"
    NOTE = "note"
    OPERATION = "operation"
    """Counters were drained, or other operations done on them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """One thing that happened.

    Attributes:
        kind: What.
        message: One sentence or phrase for people.
        time_ns: CLOCK_MONOTONIC.
    """

    kind: EventKind
    message: str
    time_ns: int
