# SPDX-License-Identifier: Apache-2.0
"""Open first windows, and tell of them: over all sites that are given, or over those that run.

How a window is run is ``first_window``'s affair.
"""

from __future__ import annotations

import threading

from optpoline.controller.events import EventKind
from optpoline.controller.first_window import FirstWindow
from optpoline.controller.hot_sites import ALL_AT_ONCE_SITES, HotSites
from optpoline.controller.lifeline import Lifeline
from optpoline.controller.records import SiteRecord
from optpoline.controller.standing import Standing
from optpoline.controller.summary import SessionState
from optpoline.controller.wording import count_of
from optpoline.errors import ProcessGone

__all__ = ["FirstLearning"]


class FirstLearning:
    """Learns sites that hold their baseline.

    Args:
        window: Links them, and lets them count.
        hot: Finds those that run.
        lifeline: Of the target.
        standing: Is told of each window.
    """

    def __init__(
        self, window: FirstWindow, hot: HotSites, lifeline: Lifeline, standing: Standing
    ) -> None:
        """Keep what is needed."""
        self._window = window
        self._hot = hot
        self._lifeline = lifeline
        self._standing = standing

    def learn(
        self,
        records: list[SiteRecord],
        length_s: float,
        stop: threading.Event | None,
        *,
        in_turn: bool,
    ) -> None:
        """Run one first window over baseline sites: all of them, or those that run.

        Args:
            records: The sites; of more than ``ALL_AT_ONCE_SITES`` those that run are learned.
            length_s: How long.
            stop: Ends the window early when set.
            in_turn: Whether many sites may count in groups, one after the other.

        Raises:
            ArenaError: if an arena has no room for the first blocks.
            ProcessGone: if the target exits meanwhile.
        """
        if len(records) > ALL_AT_ONCE_SITES:
            self.learn_hot([], length_s, stop)
            return

        def began(n_sites: int) -> None:
            self._tell(count_of(n_sites, "site"), length_s)

        self._window.learn(records, length_s, stop, in_turn=in_turn, began=began)

    def learn_hot(
        self, records: list[SiteRecord], length_s: float, stop: threading.Event | None
    ) -> None:
        """Run one first window over some sites, and those that are met in it."""
        with self._hot.watch() as lookout:
            linked = self._window.link(records)
            what = count_of(len(linked), "site") if linked else "the sites that run"
            self._tell(what, length_s)
            try:
                self._window.run(linked, length_s, stop, lookout)
            except ProcessGone:
                self._lifeline.sleep(0.0)  # notes that it has exited
                raise

    def _tell(self, what: str, length_s: float) -> None:
        """Say that a window begins."""
        self._standing.state = SessionState.LEARNING
        self._standing.tell(EventKind.LEARNING, f"learning {what} for {length_s:g} s")
