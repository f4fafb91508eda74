# SPDX-License-Identifier: Apache-2.0
"""The parts of an open session, and who of them knows whom.

Each is made for one target and knows only those it was given; the session, which has made
them, hands its user's wishes to them.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.controller.block_names import BlockNames
from optpoline.controller.children import Children
from optpoline.controller.config import Config
from optpoline.controller.events import EventKind
from optpoline.controller.exact_counts import ExactCounts, describe_operation
from optpoline.controller.executor import OperationEvent
from optpoline.controller.first_learning import FirstLearning
from optpoline.controller.first_promotion import FirstPromotion
from optpoline.controller.first_window import FirstWindow
from optpoline.controller.hot_sites import HotSites
from optpoline.controller.inventory import Inventory
from optpoline.controller.lifeline import Lifeline
from optpoline.controller.linker import Linker
from optpoline.controller.standing import Standing
from optpoline.controller.tables import Tables
from optpoline.controller.target import Target
from optpoline.controller.upkeep import Upkeep
from optpoline.model import Addr

__all__ = ["Parts", "make_parts"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Parts:
    """What works for a session on its target.

    Attributes:
        lifeline: Of the target; the session's to close.
        children: Its forked children.
        counts: Exact counts of its sites.
        names: Names of its blocks.
        window: First windows, and the sites that ever had one.
        inventory: All its sites.
        learning: Opens first windows.
        promotion: Decides on the sites that had one.
        upkeep: Looks after those that lead to blocks.
    """

    lifeline: Lifeline
    children: Children
    counts: ExactCounts
    names: BlockNames
    window: FirstWindow
    inventory: Inventory
    learning: FirstLearning
    promotion: FirstPromotion
    upkeep: Upkeep

    def close(self) -> None:
        """Release what this process holds; the target is not touched."""
        self.counts.close()
        self.children.close()
        self.names.close()


def make_parts(config: Config, target: Target, lifeline: Lifeline, standing: Standing) -> Parts:
    """Make the parts of a session; nothing is opened, and no site known yet."""
    linker = Linker(target)
    hot = HotSites(target)
    tables = Tables()
    children = Children(target, follow=config.follow_fork)
    counts = ExactCounts(target, children, lambda event: _tell_operation(standing, event))
    names = BlockNames(target, standing)
    window = FirstWindow(
        config,
        target,
        linker,
        sleep=lifeline.sleep,
        after_look=names.update,
        empty=counts.empty,
    )

    def keep_counts(site_addr: Addr, block_addr: Addr) -> None:
        """Keep what a block has counted whose memory is about to be given back."""
        record = window.ever_linked.get(site_addr)
        if record is not None:
            counts.keep(record, block_addr)

    upkeep = Upkeep(
        config,
        target,
        linker=linker,
        children=children,
        window=window,
        hot=hot,
        tables=tables,
        names=names,
        standing=standing,
        before_free=keep_counts,
    )

    def forget(start: Addr, end: Addr) -> None:
        """Let all forget the sites of a range that was unmapped."""
        window.forget(start, end)
        upkeep.forget(start, end)

    inventory = Inventory(target, standing, hot, tables, forget)
    promotion = FirstPromotion(
        config,
        target,
        linker=linker,
        window=window,
        inventory=inventory,
        tables=tables,
        upkeep=upkeep,
        standing=standing,
    )
    return Parts(
        lifeline=lifeline,
        children=children,
        counts=counts,
        names=names,
        window=window,
        inventory=inventory,
        learning=FirstLearning(window, hot, lifeline, standing),
        promotion=promotion,
        upkeep=upkeep,
    )


def _tell_operation(standing: Standing, event: OperationEvent) -> None:
    """Tell that counters were drained."""
    standing.tell(EventKind.OPERATION, describe_operation(event))
    if not event.is_exclusive:
        standing.note_once("counts may be inexact: somebody came between while they were drained")
