# SPDX-License-Identifier: Apache-2.0
"""What is done now and then for sites that lead to blocks, while the program runs.

They are settled, re-sampled, promoted anew, demoted and linked anew, and the memory of blocks
that were replaced is reclaimed: one step does what is due of all of it, in the order in which
one must not wait for the other. Sites on their thunk are looked at with it: those that have
become hot want another first window, which is not opened here.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from optpoline.controller.block_names import BlockNames
from optpoline.controller.children import Children
from optpoline.controller.config import Config
from optpoline.controller.events import EventKind
from optpoline.controller.first_window import FirstWindow
from optpoline.controller.hot_sites import HotSites
from optpoline.controller.linker import Linker
from optpoline.controller.promotion import promote_again
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.rediscovery import Rediscovery
from optpoline.controller.relinking import Relinker
from optpoline.controller.sampling import Sampler
from optpoline.controller.settling import Settler
from optpoline.controller.standing import Standing
from optpoline.controller.summary import ReclaimSummary
from optpoline.controller.tables import Tables
from optpoline.controller.target import Target
from optpoline.controller.wording import count_of
from optpoline.model import Addr

__all__ = ["Upkeep"]


class Upkeep:
    """Keeps up with the sites of one session.

    Args:
        config: Settings.
        target: The target.
        linker: Changes its text.
        children: Its forked children.
        window: Knows the sites that were ever linked.
        hot: Finds sites that run.
        tables: What sites know together.
        names: Are kept up as well.
        standing: Is told what was done.
        before_free: Called with a site and a block of it whose memory is about to be freed.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        *,
        linker: Linker,
        children: Children,
        window: FirstWindow,
        hot: HotSites,
        tables: Tables,
        names: BlockNames,
        standing: Standing,
        before_free: Callable[[Addr, Addr], None],
    ) -> None:
        """Begin with nothing to look after."""
        self._window = window
        self._names = names
        self._standing = standing
        self._reclaimer = Reclaimer(config, target, children, before_free)
        self._settler = Settler(config, self._reclaimer)
        change = self._settler.change if config.is_switched_off else promote_again
        self._sampler = Sampler(config, target.may_guard, tables, change)
        self._relinker = Relinker(linker, config.relink_after_s)
        self._rediscovery = Rediscovery(hot, self._sampler.jump_misses_hz, time.monotonic())

    @property
    def is_any_off(self) -> bool:
        """Whether the fast path of a site is switched off: what takes long should wait."""
        return self._settler.is_any_off

    def pause_s(self, now_s: float) -> float:
        """Return the time to the next step, where no fast path is switched off."""
        return self._sampler.pause_s(now_s)

    def step(self, now_s: float) -> None:
        """Do what is due, but for what takes long."""
        linked = self._window.ever_linked.values()
        # First of all, so that no site stays switched off because something else fails.
        n_settled = self._settler.step(linked, now_s)
        changed = self._settler.take_changed()
        if n_settled or changed:
            self._sampler.settled(linked, changed, now_s)
            self._tell_relearned(len(changed))
        # Before the rest, so that an arena that is used up gets room whatever fails below.
        self._reclaimer.step(linked, self._sampler.spares, now_s)
        due = self._sampler.poll(linked, now_s)
        if due:
            n_again, n_demoted = self._sampler.sample(due)
            self._tell_relearned(n_again)
            if n_demoted:
                message = f"{count_of(n_demoted, 'site')} back on the thunk"
                self._standing.tell(EventKind.DEMOTED, message)
        self._relinker.step(linked, now_s, self._settler.is_settling)
        self._names.update()

    def _tell_relearned(self, n_again: int) -> None:
        """Say how many sites were promoted anew, and which way if not the one asked for."""
        if not n_again:
            return
        reasons = "; ".join(self._settler.take_reasons())
        swapped = f", swapped: {reasons}" if reasons else ""
        message = f"{count_of(n_again, 'site')} promoted anew{swapped}"
        self._standing.tell(EventKind.RELEARNED, message)

    def find_hot(self, now_s: float) -> list[SiteRecord]:
        """Return the sites on their thunk that have become worth a first window."""
        return self._rediscovery.find(now_s)

    def decided(self, learned: Sequence[SiteRecord]) -> None:
        """Take in what became of sites that had a first window."""
        linked = list(self._window.ever_linked.values())
        self._sampler.schedule(linked, time.monotonic())
        self._rediscovery.learned(learned, time.monotonic())
        self._names.update(at_once=True)

    def forget(self, start: Addr, end: Addr) -> None:
        """Drop the sites of a range that was unmapped."""
        self._settler.forget(start, end)

    def end(self) -> None:
        """Leave no site switched off: nobody may be there to switch it on for long."""
        if self._settler.end():
            linked = self._window.ever_linked.values()
            self._sampler.settled(linked, (), time.monotonic())

    def summary(self) -> ReclaimSummary:
        """Say what memory was reclaimed so far, and what holds the rest up."""
        return self._reclaimer.summary()
