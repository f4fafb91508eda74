# SPDX-License-Identifier: Apache-2.0
"""What a session knows of each site: where its text leads, and through which blocks.

A site's way at any moment::

    text --(branch)--> home block --(head, maybe redirected)--> active block
    home     the block the text leads to; None while it holds its baseline
    active   the block that does the work: home itself, or a newer one that
             home's head jumps to until home does its work (``settling``), or
             the text is linked to it; None while home's head leads to the thunk
    counting a counting block entered through active's head during a window
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

from optpoline.controller.summary import BranchSource, SiteState
from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.model import Addr, Refusal, Site
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_plain_thunk, redirect
from optpoline.patch.layout import JournalEntry
from optpoline.promote.policy import Decision
from optpoline.promote.tree import PlannedTree

__all__ = ["SiteRecord", "SwitchedOff", "by_arena"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchedOff:
    """Why a promoted site leads to its thunk for a while (``controller/switching_off.py``).

    Attributes:
        coming: Its home as it will be when the fast path is switched on again.
        decision: What is carried out.
    """

    coming: Block
    decision: Decision


@dataclass(slots=True)
class SiteRecord:
    """The mutable state of one site; only the controller's own thread touches it."""

    site: Site
    arena: Arena
    state: SiteState
    entry: JournalEntry
    inode: int
    """Of the file that the site is in: another one may be mapped there by now."""
    branch: bytes
    """What the text holds now where a change writes (``JournalEntry.original`` at first), as we
    wrote or found it."""
    plain_thunk: Addr | None = None
    """Of a plain site: where its blocks end; None as long as it has had no block."""
    refusal: Refusal | None = None
    home: Block | None = None
    active: Block | None = None
    off: SwitchedOff | None = None
    """Set while the fast path of a promoted site is switched off to be changed."""
    counting: Block | None = None
    learner: Block | None = None
    """The counting block of the first window; used again by every later one."""
    earlier: list[tuple[Block, SiteCounts]] = field(default_factory=list)
    """The counting blocks that ``counting`` took the place of in this window, each with what
    it had counted when the window began: threads may still be inside."""
    n_grown: int = 0
    """Bigger counting blocks made since the site was last promoted."""
    counts_before: SiteCounts | None = None
    """What ``counting`` had counted when its window began."""
    drained: SiteCounts = NO_COUNTS
    """What was drained of ``counting`` in this window: a part of what the window counted."""
    drained_earlier: SiteCounts = NO_COUNTS
    """The same of the blocks in ``earlier``."""
    tables: dict[Addr, Block] = field(default_factory=dict)
    """All counting blocks of the site that there are, by address: threads may still be in those
    that nothing leads to. For ``ExactCounts``, as is ``undrained``."""
    undrained: SiteCounts = NO_COUNTS
    """What was taken out of them for other reasons than ``Session.drain``, which wants it too."""
    window_start_s: float = 0.0
    counting_start_s: float = 0.0
    """When ``counting`` was entered, at the begin of the window or on the way."""
    counted: SiteCounts | None = None
    """All that the last window counted, in all its blocks: exact. ``counts`` may leave out
    what its first blocks counted."""
    watched_targets: int = 0
    """Sum of the targets that a jump's slots held when they were last looked at."""
    plan: PlannedTree | None = None
    source: BranchSource | None = None
    """Whose counts it was last decided on by, promoted or not; None as long as by nobody's."""
    counts: SiteCounts | None = None
    """What the last first window counted, as far as it tells shares."""
    window_s: float = 0.0
    """In how many seconds."""
    is_news: bool = False
    """Whether nothing was decided by ``counts`` yet. A window that counts nothing leaves old ones
    as they are."""
    rate_hz: float | None = None
    """Branches a second when last counted."""
    profile: SiteCounts | None = None
    """What is known of a promoted site's targets by now: a blend of windows."""
    sampled: SiteCounts | None = None
    """What the parts of the present re-sampling window have counted."""
    n_parts: int = 0
    sample_every_s: float = 0.0
    next_sample_s: float = 0.0
    n_confirmed: int = 0
    n_changes: int = 0
    """Re-promotions that the site has not lived down (``promote.policy.SiteHistory``)."""
    calm_since_s: float = 0.0
    hold_until_s: float = 0.0
    """Before that a window of the site would change nothing."""
    changed_s: float = 0.0
    n_relearned: int = 0
    n_relinked: int = 0
    """How often a stop has linked the text to where the site leads, for want of room at home."""
    far_targets: set[Addr] = field(default_factory=set)
    """Targets that no direct branch from the arena reaches; they stay on the thunk."""
    operand_targets: set[Addr] = field(default_factory=set)
    """Targets at which the register that led there may still be needed."""
    unsafe_targets: set[Addr] = field(default_factory=set)
    """Targets that were found to read flags; a site that has one is refused."""

    @property
    def thunk_addr(self) -> Addr:
        """Where the baseline leads; of a plain site, what does the same."""
        return self.site.thunk.addr if self.plain_thunk is None else self.plain_thunk

    def make_thunk(self) -> None:
        """Have a thunk before the first block, if the site has none of the program's.

        Raises:
            ArenaError: if the arena is used up.
            EncodeRangeError: if its target is in memory, and out of reach.
        """
        if self.site.is_plain and self.plain_thunk is None:
            site = self.site
            self.plain_thunk = add_plain_thunk(
                self.arena, site.thunk.operand, site.load, site_addr=site.addr
            )

    def refuse(self, reason: Refusal) -> None:
        """Give the site up at once: whoever enters its blocks goes to the thunk.

        Target state: running; one store a block. The text follows at the next relink.
        """
        self.state = SiteState.REFUSED
        self.refusal = reason
        for block in (self.home, self.active, self.counting, self.learner):
            if block is not None:
                redirect(block, self.thunk_addr)
        self.active = self.off = self.counting = self.counts_before = None
        self.earlier.clear()
        self.plan = self.profile = None

    def forget_links(self) -> None:
        """Start anew: the site's text is its baseline again, without our doing."""
        self.state = SiteState.BASELINE
        self.branch = self.entry.original
        self.home = self.active = self.off = self.counting = self.counts_before = None
        self.earlier.clear()
        self.plan = self.profile = self.counts = self.counted = self.sampled = None
        self.source = None
        self.is_news = False
        self.n_parts = 0

    @property
    def news(self) -> SiteCounts | None:
        """What a first window counted that nothing was decided by yet, or None."""
        return self.counts if self.is_news else None

    @property
    def known(self) -> SiteCounts | None:
        """What is known of the site's targets, or None before any window."""
        return self.profile if self.profile is not None else self.counts

    @property
    def hit_rate(self) -> float | None:
        """Share of the branches known that the plan has a guard for."""
        if self.plan is None or self.known is None or not self.known.total:
            return None
        if self.source is BranchSource.TABLE:
            return None  # what is known is the table's
        shares = self.known.shares()
        return sum(shares.get(target, 0.0) for target in self.plan.targets)


def by_arena(records: Iterable[SiteRecord]) -> Iterator[tuple[Arena, list[SiteRecord]]]:
    """Yield the arenas of some sites, each with its sites."""
    groups: dict[Addr, list[SiteRecord]] = defaultdict(list)
    for record in records:
        groups[record.arena.addr].append(record)
    for group in groups.values():
        yield group[0].arena, group
