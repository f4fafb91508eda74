# SPDX-License-Identifier: Apache-2.0
"""Link the text of promoted sites to where they go by now, once they have been quiet.

A site that was promoted anew takes a jump on its way. Most are settled without a stop
(``controller/settling.py``); this is for those that cannot be, and for demoted ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import Refusal

__all__ = ["Relinker"]

RELINK_EVERY_S = 0.25
"""Time between looks for sites whose text is to be linked anew."""

MAX_RELINK_WAITS = 64
"""A site whose text is linked anew again and again has to be quiet twice as long each time, up
to so many times ``relink_after_s``: each costs a stop, and saves a jump."""


class Relinker:
    """Links text anew; one a session.

    Args:
        linker: Changes the text.
        relink_after_s: How long a site must have been quiet (``Config``).
    """

    def __init__(self, linker: Linker, relink_after_s: float) -> None:
        """Keep what is needed."""
        self._linker = linker
        self._relink_after_s = relink_after_s
        self._next_look_s = 0.0

    def step(
        self, records: Iterable[SiteRecord], now_s: float, is_settling: Callable[[SiteRecord], bool]
    ) -> int:
        """Link the text of changed and quiet sites to where they go by now.

        One stop for all of them, or none if there is nothing to do.

        Args:
            records: The sites.
            now_s: CLOCK_MONOTONIC, seconds.
            is_settling: Tells whether a site may soon be settled without.
        """
        if now_s < self._next_look_s:
            return 0
        self._next_look_s = now_s + min(RELINK_EVERY_S, self._relink_after_s)
        moves = [
            Move(record=record, block=record.active)
            for record in records
            if record.home is not record.active
            and record.refusal is not Refusal.FOREIGN_BYTES
            and record.state is not SiteState.LEARNING
            and now_s - record.changed_s >= self._relink_wait_s(record)
            and not is_settling(record)
        ]
        for move in moves:
            move.record.n_relinked += 1
        return self._linker.link(moves) if moves else 0

    def _relink_wait_s(self, record: SiteRecord) -> float:
        """Return how long a site must be quiet before a stop is made for its text."""
        # One that leads to its thunk takes a jump for nothing.
        n_waits = 1 if record.active is None else min(MAX_RELINK_WAITS, 2**record.n_relinked)
        return n_waits * self._relink_after_s
