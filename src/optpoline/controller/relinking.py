# SPDX-License-Identifier: Apache-2.0
"""Link the text of promoted sites to where they go by now, once they have been quiet.

A site that was promoted anew takes a jump on its way. Most are settled without a stop
(``controller/settling.py``); this is for those that cannot be, and for demoted ones.

Some are linked only while all threads stand, which one that sleeps in a call that must not
be interrupted forbids for as long as it does; and while a debugger has the threads none can
be stopped. What was tried in vain is tried again after twice as long each time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.errors import OptpolineError
from optpoline.model import Refusal
from optpoline.patch.text import needs_all_stopped

__all__ = ["Relinker"]

RELINK_EVERY_S = 0.25
"""Time between looks for sites whose text is to be linked anew."""

MAX_RELINK_WAITS = 64
"""A site whose text is linked anew again and again has to be quiet twice as long each time, up
to so many times ``relink_after_s``: each costs a stop, and saves a jump. No pause after a try
in vain is longer either."""


@dataclass(slots=True)
class _Patience:
    """When to try again what was tried in vain.

    Attributes:
        unit_s: Half of the first pause.
        pause_s: The present one, 0 behind a try that was not in vain.
        until_s: When it ends, CLOCK_MONOTONIC.
    """

    unit_s: float
    pause_s: float = 0.0
    until_s: float = 0.0

    def note(self, now_s: float, *, is_vain: bool) -> None:
        """Note a try."""
        longer_s = min(MAX_RELINK_WAITS * self.unit_s, 2 * max(self.pause_s, self.unit_s))
        self.pause_s = longer_s if is_vain else 0.0
        self.until_s = now_s + self.pause_s


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
        self._stops = _Patience(relink_after_s)
        # One sleeper is in the way of all of them.
        self._stops_of_all = _Patience(relink_after_s)

    def step(
        self, records: Iterable[SiteRecord], now_s: float, is_settling: Callable[[SiteRecord], bool]
    ) -> int:
        """Link the text of changed and quiet sites to where they go by now.

        In one stop, and one more of all threads if a site needs that, or in none if there is
        nothing to do.

        Args:
            records: The sites.
            now_s: CLOCK_MONOTONIC, seconds.
            is_settling: Tells whether a site may soon be settled without.

        Returns:
            How many have moved.

        Raises:
            StopTimeout: if the threads could not be stopped.
            PermissionDenied: if one cannot be traced.
            ProcessGone: if the target is gone.
        """
        if now_s < max(self._next_look_s, self._stops.until_s):
            return 0
        self._next_look_s = now_s + min(RELINK_EVERY_S, self._relink_after_s)
        may_stop_all = now_s >= self._stops_of_all.until_s
        moves = [
            Move(record=record, block=record.active)
            for record in records
            if _is_elsewhere(record)
            and record.state is not SiteState.LEARNING
            and now_s - record.changed_s >= self._relink_wait_s(record)
            and (may_stop_all or not needs_all_stopped(record.entry))
            and not is_settling(record)
        ]
        return self._link(moves, now_s) if moves else 0

    def _link(self, moves: Sequence[Move], now_s: float) -> int:
        """Link, and note what was in vain; return how many sites moved."""
        try:
            self._linker.link(moves)
        except OptpolineError:
            self._stops.note(now_s, is_vain=True)
            raise
        finally:
            # An error may come when some have moved.
            moved = [move.record for move in moves if move.record.home is move.block]
            for record in moved:
                record.n_relinked += 1
        self._stops.note(now_s, is_vain=False)
        patient = [move.record for move in moves if needs_all_stopped(move.record.entry)]
        if patient:
            self._stops_of_all.note(now_s, is_vain=any(map(_is_elsewhere, patient)))
        return len(moved)

    def _relink_wait_s(self, record: SiteRecord) -> float:
        """Return how long a site must be quiet before a stop is made for its text."""
        # One that leads to its thunk takes a jump for nothing.
        n_waits = 1 if record.active is None else min(MAX_RELINK_WAITS, 2**record.n_relinked)
        return n_waits * self._relink_after_s


def _is_elsewhere(record: SiteRecord) -> bool:
    """Tell whether a site's text does not lead where it should, and is ours to change."""
    return record.home is not record.active and record.refusal is not Refusal.FOREIGN_BYTES
