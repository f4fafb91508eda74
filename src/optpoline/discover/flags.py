# SPDX-License-Identifier: Apache-2.0
"""Tell at which jump sites the arithmetic flags may be destroyed.

The rule: flags must be dead wherever the jump may lead, learned or not, for a
miss leads to an address that nobody has seen yet. At function entries they are
dead by the ABI. For labels the code behind is followed until every flag is
written, or one is read.

A jump through a thunk, met on the way, counts as dead: where it leads is in
the same set of labels. That is an argument by coinduction: were any label
live by way of such jumps only, some label would have to be live by itself.
"""

from __future__ import annotations

from optpoline.discover.functions import Span
from optpoline.discover.image import ModuleImage
from optpoline.discover.labels import LabelIndex
from optpoline.model import Addr, Refusal
from optpoline.x86.flags import ARITHMETIC_FLAGS, FlagsFate, run_flags

__all__ = ["FlagsAnalysis", "flags_dead_at"]

_MAX_RUNS = 200
"""Runs of code followed from one label before it counts as live: far more than compiled
code needs, where the first arithmetic instruction settles it."""

_MAX_RUN_SIZE = 1024
"""Bytes of one run looked at, likewise."""


class FlagsAnalysis:
    """Flags at the addresses that the jump sites of one module may reach.

    Args:
        image: The module.
    """

    def __init__(self, image: ModuleImage) -> None:
        """Analyse nothing yet."""
        self._image = image
        self._thunk_addrs = frozenset(thunk.addr for thunk in image.thunks.thunks)
        self._labels: LabelIndex | None = None
        self._dead_at: dict[Addr, bool] = {}
        self._refusals: dict[Span, Refusal | None] = {}

    def refusal_at(self, site_addr: Addr) -> Refusal | None:
        """Say why a jump site must not destroy flags, or None if it may."""
        span = self._image.functions.find(site_addr)
        if span is None:
            return Refusal.FLAGS_UNKNOWN
        if span not in self._refusals:
            if self._labels is None:
                self._labels = LabelIndex(self._image)
            is_dead = all(self.is_dead_at(label) for label in self._labels.of_function(span))
            self._refusals[span] = None if is_dead else Refusal.FLAGS_LIVE
        return self._refusals[span]

    def is_dead_at(self, addr: Addr) -> bool:
        """Say whether nothing depends on the flags' values at an address."""
        if addr not in self._dead_at:
            self._dead_at[addr] = self._follow(addr)
        return self._dead_at[addr]

    def _follow(self, addr: Addr) -> bool:
        """Follow the code from an address until all flags are dead, or one is live."""
        start = (addr, ARITHMETIC_FLAGS)
        todo, seen = [start], {start}
        while todo:
            run_addr, pending = todo.pop()
            if self._is_dead_by_convention(run_addr, is_first=run_addr == addr):
                continue
            text = self._image.text_at(run_addr)
            if text is None or len(seen) > _MAX_RUNS:
                return False
            code = text.code_at(run_addr, _MAX_RUN_SIZE)
            run = run_flags(code, run_addr, pending, self._image.changeable.forks)
            if run.fate is FlagsFate.LIVE:
                return False
            ahead = [(successor, run.pending) for successor in run.successors]
            todo += [state for state in ahead if state not in seen]
            seen.update(ahead)
        return True

    def _is_dead_by_convention(self, addr: Addr, *, is_first: bool) -> bool:
        """Say whether no code needs to be looked at: an entry, a PLT stub, a thunk."""
        image = self._image
        if addr in self._thunk_addrs or image.is_in_plt(addr):
            return True
        if not image.functions.is_start(addr) or image.is_cold_start(addr):
            return False
        # What unwinds by itself may be the cold part of the function that jumps there;
        # without symbols only what is reached by its address is an entry for sure.
        return is_first or not image.is_stripped


def flags_dead_at(image: ModuleImage, addr: Addr) -> bool:
    """Say whether the flags are dead at an address of a module.

    For a learned target of a jump site, before it is promoted: a table of label
    differences is not seen by ``find_sites``. False outside the module's text.
    """
    return FlagsAnalysis(image).is_dead_at(addr)
