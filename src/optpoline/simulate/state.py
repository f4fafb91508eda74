# SPDX-License-Identifier: Apache-2.0
"""The state of a replay: which tree each site has, since when, and what was done.

The result is a list of *tenures*: the tree a site had during a time. What they cost is
worked out afterwards (``outcome``), for all slices of a tenure at once.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.learn.pooling import TablePool
from optpoline.model import Count, Miss, SiteKind, Table, TreeNode
from optpoline.promote.policy import Decision, Policy, SiteHistory, SiteView
from optpoline.promote.tree import PlannedTree
from optpoline.simulate.memory import BlockMemory
from optpoline.simulate.windows import Window, run_window
from optpoline.simulate.workload import Workload

__all__ = ["EngineModel", "Replay", "ReplayState", "SimulatedSite", "Tenure"]


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineModel:
    """The engine's own numbers, as in ``controller/``; a test holds them together.

    Attributes:
        poll_s: Interval of looking at miss counters (``Config.poll_s``).
        wave_s: Time between looks at full slots in a first window (``Config.wave_s``).
        relearn_s: Length of later learning windows (``Config.relearn_s``).
        look_s: The same in a window of a site that misses (``sampling``).
        max_due: Sites that count at a poll because their time has come (``sampling``).
        review_every_s: Time between looks at what all windows cost (``sampling``).
        all_at_once_sites: Sites up to which all are learned at once (``hot_sites``).
        hot_wave_s: Time between waves of a window over sites that run (``hot_sites``).
        hot_hz: Samples a second of CPU time meanwhile (``hot_sites``).
        thunk_look_every_s: Time between looks at time spent in thunks (``rediscovery``).
        n_calm_looks: Looks without a window after which the time between them doubles.
        calm_look_every_s: What it comes to at most.
        thunk_look_s: Length of one.
        thunk_look_hz: Samples a second of CPU time meanwhile.
        after_finds_s: From a window that had sites promoted to the next look.
        after_nothing_s: From one that had not.
        first_rest_s: How long a site is left alone whose window did not get it promoted.
        last_rest_s: The most that comes to by doubling.
        thunk_s: Seconds that a branch spends in its thunk.
        n_cpus: CPUs that counter rows are for.
        is_sharing: Whether sites of one table share what they learn (``promote/sharing.py``).
        seed: Of all chance: which targets come first, which sites samples meet.
    """

    poll_s: float = 0.05
    wave_s: float = 0.025
    relearn_s: float = 0.25
    look_s: float = 0.002
    max_due: int = 48
    review_every_s: float = 2.0
    all_at_once_sites: int = 2048
    hot_wave_s: float = 0.1
    hot_hz: float = 3989.0
    thunk_look_every_s: float = 1.0
    n_calm_looks: int = 4
    calm_look_every_s: float = 8.0
    thunk_look_s: float = 0.05
    thunk_look_hz: float = 1993.0
    after_finds_s: float = 0.5
    after_nothing_s: float = 2.0
    first_rest_s: float = 2.0
    last_rest_s: float = 600.0
    thunk_s: float = 7e-9
    n_cpus: int = 2
    is_sharing: bool = True
    seed: int = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class Tenure:
    """A time in which a site had one tree.

    Attributes:
        site: Which.
        start_s: From when.
        end_s: To when.
        tree: What it had; ``Miss()`` on its thunk.
        is_counting: Whether each of its branches is counted as well.
    """

    site: int
    start_s: float
    end_s: float
    tree: TreeNode
    is_counting: bool = False


@dataclass(slots=True, kw_only=True)
class Replay:
    """What a policy did with a workload.

    Attributes:
        policy: Its name.
        memory: Blocks and counter cells.
        tenures: Of all sites, each site's one after the other without a hole.
        counted: (moment, branches counted at promoted sites then): all later windows.
        n_windows: Windows of promoted sites.
        n_learning: Windows of sites that were not promoted.
        n_promoted: Promotions of sites on their thunk.
        n_repromoted: Promotions of sites that were promoted.
        n_demoted: Demotions.
    """

    policy: str
    memory: BlockMemory
    tenures: list[Tenure] = field(default_factory=list)
    counted: list[tuple[float, float]] = field(default_factory=list)
    n_windows: int = 0
    n_learning: int = 0
    n_promoted: int = 0
    n_repromoted: int = 0
    n_demoted: int = 0


@dataclass(slots=True)
class SimulatedSite:
    """The state of one site; ``controller.records.SiteRecord`` without addresses."""

    number: int
    kind: SiteKind
    max_guards: int = 0
    pool: TablePool | None = None
    """Of its table; None where no other site has it."""
    knows_itself: bool = False
    """Whether it was ever decided on by what it counted itself: its table is not asked again."""
    is_plain: bool = False
    history: SiteHistory = field(default_factory=SiteHistory)
    tree: TreeNode = field(default_factory=Miss)
    since_s: float = 0.0
    """When it was given that tree."""
    sampled: SiteCounts = NO_COUNTS
    n_parts: int = 0
    rate_hz: float = 0.0
    interval_s: float = 0.0
    """To its next window, before stretching; 0 while it is on no schedule."""
    rest_s: float = 0.0
    rests_until_s: float = 0.0

    @property
    def is_promoted(self) -> bool:
        """Whether it has a tree."""
        return self.history.current is not None

    @property
    def is_by_table(self) -> bool:
        """Whether its tree is its table's."""
        return self.pool is not None and self.is_promoted and not self.knows_itself


def _make_pools(workload: Workload) -> dict[Table | None, TablePool]:
    """Return an empty pool for each table that two sites have."""
    n_sites = Counter(site.table for site in workload.sites if site.table is not None)
    return {table: TablePool() for table, n in n_sites.items() if n > 1}


class ReplayState:
    """A replay under way: what both kinds of window work on.

    Args:
        workload: What the program does.
        policy: What decides.
        engine: The engine around it.
    """

    def __init__(self, workload: Workload, policy: Policy, engine: EngineModel) -> None:
        """Have every site on its thunk."""
        self.workload = workload
        self.policy = policy
        self.engine = engine
        self.rng = np.random.default_rng(engine.seed)
        self.memory = BlockMemory(engine.n_cpus)
        self.replay = Replay(policy=policy.name, memory=self.memory)
        pools = _make_pools(workload)
        self.sites = [
            SimulatedSite(
                number=i,
                kind=SiteKind(site.kind),
                is_plain=site.is_plain,
                max_guards=site.max_guards,
                pool=pools.get(site.table) if engine.is_sharing else None,
            )
            for i, site in enumerate(workload.sites)
        ]
        n_sites = len(self.sites)
        self.is_promoted: NDArray[np.bool_] = np.zeros(n_sites, np.bool_)
        self.is_guarded: NDArray[np.bool_] = np.zeros(len(workload.pair_sites), np.bool_)
        """Of each pair: whether the site's tree has a guard for it."""
        self.judged_hz = np.zeros(n_sites)
        """Misses a second of each site that were found to be no reason for a change."""
        self.due_s = np.full(n_sites, np.inf)
        self.hold_s = np.zeros(n_sites)

    def run_window(
        self, site: SimulatedSite, start_s: float, end_s: float, *, wave_s: float, n_open: int
    ) -> Window:
        """Let a site count."""
        current = site.history.current
        targets = () if current is None else current.targets
        return run_window(
            self.workload,
            site.number,
            start_s,
            end_s,
            known=tuple(Count(target=target, hit_count=1) for target in targets),
            n_open=n_open,
            max_slots=self.policy.schedule.max_slots,
            wave_s=wave_s,
            rng=self.rng,
        )

    def view(
        self,
        site: SimulatedSite,
        counts: SiteCounts,
        *,
        window_s: float,
        now_s: float,
        hotter_ratio: float = 0.0,
    ) -> SiteView:
        """Return what the policy is told of a site."""
        return site.history.view(
            counts,
            window_s=window_s,
            now_s=now_s,
            kind=site.kind,
            hotter_ratio=hotter_ratio,
            max_guards=site.max_guards,
            is_plain=site.is_plain,
        )

    def promote(self, site: SimulatedSite, plan: PlannedTree, now_s: float) -> None:
        """Give a site a tree."""
        self.end_tenure(site, now_s)
        site.tree = plan.tree
        pairs = self.workload.pairs_of(site.number)
        targets = np.array(plan.targets, np.int64)
        self.is_guarded[pairs] = np.isin(self.workload.pair_targets[pairs], targets)
        self.is_promoted[site.number] = True
        self.judged_hz[site.number] = 0.0
        self.memory.write_promoted(site.number, len(plan.targets))

    def demote(self, site: SimulatedSite, now_s: float) -> None:
        """Lead a site back to its thunk."""
        self.end_tenure(site, now_s)
        site.tree = Miss()
        site.knows_itself = True  # its table would promote it again
        site.interval_s = 0.0
        self.is_guarded[self.workload.pairs_of(site.number)] = False
        self.is_promoted[site.number] = False
        self.due_s[site.number] = np.inf
        self.memory.drop(site.number)

    def end_tenure(self, site: SimulatedSite, now_s: float) -> None:
        """Note what a site had until now."""
        if now_s > site.since_s:
            self.replay.tenures.append(
                Tenure(site=site.number, start_s=site.since_s, end_s=now_s, tree=site.tree)
            )
        site.since_s = now_s

    def keep(self, site: SimulatedSite, decision: Decision, now_s: float) -> None:
        """Keep what the policy goes by next time."""
        site.history = site.history.after(decision, now_s)
