# SPDX-License-Identifier: Apache-2.0
"""Decide on the sites that had a first window, and tell what became of them."""

from __future__ import annotations

import time
from collections.abc import Sequence

from optpoline.controller.config import Config
from optpoline.controller.events import EventKind
from optpoline.controller.first_window import FirstWindow
from optpoline.controller.inventory import Inventory
from optpoline.controller.linker import Linker
from optpoline.controller.not_promoted import explain_not_promoted, find_unlinked
from optpoline.controller.promotion import FIRST_SLACK_RATIO, NEXT_SLACK_RATIO, promote_first
from optpoline.controller.records import SiteRecord
from optpoline.controller.standing import Standing
from optpoline.controller.summary import SessionState, SiteState
from optpoline.controller.tables import Tables
from optpoline.controller.target import Target
from optpoline.controller.upkeep import Upkeep
from optpoline.controller.wording import count_of

__all__ = ["FirstPromotion"]


class FirstPromotion:
    """Promotes what a first window found worth it; the rest gets its baseline back.

    Args:
        config: Settings.
        target: The target.
        linker: Changes its text.
        window: Has the sites that were learned.
        inventory: Has all.
        tables: What sites know together.
        upkeep: Looks after the promoted ones from then on.
        standing: Is told what became of them.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        *,
        linker: Linker,
        window: FirstWindow,
        inventory: Inventory,
        tables: Tables,
        upkeep: Upkeep,
        standing: Standing,
    ) -> None:
        """Keep what is needed."""
        self._config = config
        self._target = target
        self._linker = linker
        self._window = window
        self._inventory = inventory
        self._tables = tables
        self._upkeep = upkeep
        self._standing = standing

    def promote(self) -> int:
        """Decide on all sites that lead to a first counting block, or wait for it.

        And on those that share a table with them.

        Returns:
            How many sites were promoted.
        """
        linked = self._window.ever_linked.values()
        learned = [r for r in linked if r.home is not None and r.active is None and r.off is None]
        waiting, self._window.waiting = self._window.waiting, []
        learned += [r for r in waiting if r.home is None]
        idle = self._tables.find_idle(learned)
        is_switched_off = self._config.is_switched_off
        begin_s = time.monotonic()
        try:
            n_promoted = promote_first(
                [*learned, *idle],
                policy=self._config.policy,
                linker=self._linker,
                may_guard=self._target.may_guard,
                guard_kin=self._target.guard_kin,
                now_s=begin_s,
                promote_plain=self._config.promote_plain,
                slack_ratio=NEXT_SLACK_RATIO if is_switched_off else FIRST_SLACK_RATIO,
                tables=self._tables,
            )
        finally:
            by_table = [r for r in idle if r.state is SiteState.PROMOTED]
            self._window.ever_linked.update((r.site.addr, r) for r in by_table)
            for record in learned:
                if record.state is SiteState.LEARNING:
                    record.state = SiteState.BASELINE
        self._standing.state = SessionState.PROMOTED
        try:
            self._tell(n_promoted, [*learned, *by_table], time.monotonic() - begin_s)
        finally:
            self._upkeep.decided(learned)
        return n_promoted

    def _tell(self, n_promoted: int, learned: Sequence[SiteRecord], took_s: float) -> None:
        """Say what became of the sites that were learned."""
        if n_promoted:
            message = f"{n_promoted} of {count_of(len(learned), 'site')} in {took_s:.3f} s"
            self._standing.tell(EventKind.PROMOTED, message)
            return
        more = any(record.state is SiteState.PROMOTED for record in self._inventory.records)
        tried = self._window.ever_linked.values()
        why = explain_not_promoted(
            self._target.pid,
            learned,
            find_unlinked(tried, learned),
            promote_plain=self._config.promote_plain,
        )
        message = f"nothing {'more ' if more else ''}to promote yet: {why}"
        self._standing.tell(EventKind.NOT_PROMOTED, message)
