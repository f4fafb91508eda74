# SPDX-License-Identifier: Apache-2.0
"""Replays with known answers."""

from __future__ import annotations

import itertools
from dataclasses import replace

import numpy as np
import pytest

from optpoline.controller import (
    growing,
    hot_sites,
    learning,
    rediscovery,
    sampling,
    window_counts,
)
from optpoline.controller.config import Config
from optpoline.learn.counting import plan_counting
from optpoline.model import (
    Addr,
    BlockPlan,
    Count,
    CounterRows,
    Guard,
    Miss,
    RseqAbi,
    tree_targets,
)
from optpoline.patch.geometry import ArenaGeometry
from optpoline.promote.cost import CostModel
from optpoline.promote.policies import POLICY_NAMES, policy_named
from optpoline.promote.schedule import WatchSchedule
from optpoline.promote.tree import balance_tree, plan_tree, tree_cost
from optpoline.simulate import sampling as simulated_sampling
from optpoline.simulate import windows
from optpoline.simulate.changes import find_changes
from optpoline.simulate.compare import ORACLE, STATIC, Comparison, compare
from optpoline.simulate.cycles import hits_of_slices, tree_cycles
from optpoline.simulate.engine import replay
from optpoline.simulate.projection import Measured, project, row_size
from optpoline.simulate.sizes import counting_block_size, promoted_block_size
from optpoline.simulate.state import EngineModel
from optpoline.simulate.synthetic import make_synthetic, parse_synthetic
from optpoline.simulate.windows import observe, run_window
from optpoline.simulate.workload import Workload, WorkloadSite
from optpoline.x86.blocks import encode_block

SLICE_S = 0.0025
MODEL = CostModel()


def synthetic(text: str) -> Workload:
    """Return a synthetic workload."""
    return make_synthetic(*parse_synthetic(text))


def flip(at_s: float, seconds: float, n_a_second: int = 1_000_000) -> Workload:
    """Return one site whose only target changes once, without any noise."""
    n_slices, n_before = round(seconds / SLICE_S), round(at_s / SLICE_S)
    per_slice = n_a_second * SLICE_S
    return Workload(
        name="flip",
        sites=(WorkloadSite(name="a"),),
        pair_sites=np.zeros(2, np.int64),
        pair_targets=np.array([0x1000, 0x2000]),
        contents=np.array([[per_slice, 0.0], [0.0, per_slice]]),
        slices=np.array([0] * n_before + [1] * (n_slices - n_before)),
        factors=np.ones(n_slices),
    )


def one(workload: Workload, name: str = "adaptive") -> Comparison:
    """Replay one policy."""
    return compare(workload, [policy_named(name)])


# --- what a tree costs


def test_cycles_are_those_of_the_cost_model() -> None:
    rng = np.random.default_rng(3)
    targets = np.arange(12) * 64 + 0x1000
    rows = rng.integers(0, 1000, (5, 12)).astype(float)
    counts = [
        Count(target=Addr(int(t)), hit_count=int(n)) for t, n in zip(targets, rows[0], strict=True)
    ]
    for tree in (
        Miss(),
        plan_tree(counts, 0, MODEL).tree,
        plan_tree(counts[:5], 0, MODEL).tree,
        balance_tree(counts),
        Guard(Addr(0x9999), None, Miss()),
    ):
        cycles = tree_cycles(tree, rows, targets, MODEL)
        for row, found in zip(rows, cycles, strict=True):
            shares = {Addr(int(t)): n / row.sum() for t, n in zip(targets, row, strict=True)}
            assert found / row.sum() == pytest.approx(tree_cost(tree, shares, MODEL))


def test_a_miss_costs_what_it_does_at_its_site() -> None:
    # Too rare to be promoted.
    rare = flip(1.0, 2.0, n_a_second=20)
    plain = replace(rare, sites=(replace(rare.sites[0], is_plain=True),))
    costs = [one(workload).outcomes[0].cycles for workload in (rare, plain)]
    assert costs[0] - costs[1] == pytest.approx(MODEL.retpoline_cycles - MODEL.plain_cycles)


def test_hits() -> None:
    rows = np.array([[1.0, 2.0], [0.0, 4.0]])
    tree = Guard(Addr(20), None, Miss())
    assert list(hits_of_slices(tree, rows, np.array([10, 20]))) == [2.0, 4.0]


# --- what a counting block sees


def test_slots_are_for_who_comes_first() -> None:
    taken = np.array([1000.0, 500.0, 10.0, 0.0])
    targets = np.array([1, 2, 3, 4])
    rng = np.random.default_rng(1)
    seen = observe(taken, targets, [Addr(3)], 1, rng)
    assert seen.total == 1510
    named = {int(count.target) for count in seen.counts}
    assert 3 in named
    assert len(named) == 2
    assert observe(taken, targets, [], 9, rng).n_unknown == 0
    firsts = [observe(taken, targets, [], 1, rng).counts[0].target for _ in range(600)]
    assert firsts.count(Addr(1)) / 600 == pytest.approx(1000 / 1510, abs=0.07)


def test_window_grows_until_all_is_known() -> None:
    workload = synthetic("alternating:sites=1,targets=80,rate=1e7,seconds=1")
    window = run_window(
        workload,
        0,
        0.0,
        1.0,
        known=(),
        n_open=2,
        max_slots=0,
        wave_s=0.025,
        rng=np.random.default_rng(1),
    )
    # 2, 6, 24 and 64 slots: three successors, one at each wave.
    assert [stage.n_open for stage in window.stages] == [2, 6, 24, 64]
    assert [stage.end_s for stage in window.stages] == pytest.approx([0.025, 0.05, 0.075, 1.0])
    assert [len(stage.known) for stage in window.stages] == [0, 2, 8, 32]
    assert len(window.counts.counts) == 80
    assert window.window_s == pytest.approx(0.925)
    assert window.total == pytest.approx(1e7, rel=0.02)


def test_window_of_limited_slots_does_not_grow() -> None:
    workload = synthetic("alternating:sites=1,targets=80,rate=1e7,seconds=1")
    rng = np.random.default_rng(1)
    window = run_window(
        workload, 0, 0.0, 1.0, known=(), n_open=2, max_slots=4, wave_s=0.025, rng=rng
    )
    assert len(window.stages) == 1
    assert len(window.counts.counts) == 4
    assert window.counts.n_unknown == pytest.approx(76 / 80 * 1e7, rel=0.02)


# --- whole replays


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_alternating_pair(name: str) -> None:
    """Learned for 1 of 20 s on the thunk, with both targets in slots; direct ever after."""
    comparison = one(synthetic("alternating:sites=1,seconds=20"), name)
    (outcome,) = comparison.outcomes
    assert outcome.hit_ratio == pytest.approx(19 / 20, abs=0.001)
    assert outcome.replay is not None
    assert (outcome.replay.n_promoted, outcome.replay.n_repromoted) == (1, 0)
    assert comparison.n_changes == 0
    # 1 s of a retpoline with counting, 19 s of two guards.
    two_guards = plan_tree([Count(target=Addr(n), hit_count=1) for n in (1, 2)], 0, MODEL).cycles
    learning = MODEL.retpoline_cycles + WatchSchedule().counting_cycles
    expected = (1 * learning + 19 * two_guards) / 20
    assert outcome.cycles - outcome.watch_cycles == pytest.approx(expected, rel=0.001)


def test_three_targets_settle() -> None:
    workload = synthetic("alternating:sites=1,targets=3,seconds=20")
    comparison = compare(workload, [policy_named(name) for name in POLICY_NAMES])
    outcomes = {outcome.policy: outcome for outcome in comparison.outcomes}
    adaptive, cree = outcomes["adaptive"], outcomes["cree"]
    assert adaptive.hit_ratio > 0.97
    assert adaptive.replay is not None
    assert adaptive.replay.n_repromoted <= 1
    # Two branches for three targets: a third of the branches misses, and they change for ever.
    assert cree.hit_ratio == pytest.approx(19 / 20 * 2 / 3, abs=0.01)
    assert cree.replay is not None
    assert cree.replay.n_repromoted > 20


@pytest.mark.parametrize("at_s", [2.0, 2.5, 3.03])
def test_flip_is_followed_at_the_next_poll(at_s: float) -> None:
    workload = flip(at_s, 6.0)
    (change,) = find_changes(workload)
    assert change.first == round(at_s / SLICE_S)
    (outcome,) = one(workload).outcomes
    assert outcome.replay is not None
    assert (outcome.replay.n_repromoted, outcome.replay.n_demoted) == (1, 0)
    assert outcome.adaptation.n_missed == 0
    assert outcome.adaptation.median_s is not None
    # One poll of 50 ms until it is seen, a window of 20 ms until it is known.
    assert 0.0 < outcome.adaptation.median_s <= 0.05 + 0.02 + 2 * SLICE_S
    missed_s = outcome.adaptation.median_s
    assert outcome.hit_ratio == pytest.approx(1 - (1.0 + missed_s) / 6.0, abs=0.003)


def test_flip_is_missed_by_who_decides_once() -> None:
    (outcome,) = one(flip(2.0, 6.0), "llvm").outcomes
    assert outcome.adaptation.n_missed == 1
    assert outcome.adaptation.median_s == pytest.approx(4.0)
    assert outcome.hit_ratio == pytest.approx(1 / 6, abs=0.001)


def test_ideals() -> None:
    comparison = one(flip(2.0, 6.0))
    static, oracle = comparison.ideals
    assert (static.policy, oracle.policy) == (STATIC, ORACLE)
    assert static.hit_ratio == oracle.hit_ratio == pytest.approx(1.0)
    assert oracle.cycles == pytest.approx(MODEL.compare_cycles)
    assert oracle.cycles < static.cycles < comparison.best.cycles
    assert oracle.adaptation.median_s == 0.0


def test_nothing_runs() -> None:
    workload = flip(1.0, 3.0, n_a_second=0)
    (outcome,) = one(workload).outcomes
    assert outcome.replay is not None
    assert outcome.replay.n_promoted == 0
    assert outcome.hit_ratio == 0.0


def test_cold_site_is_found_when_it_becomes_hot() -> None:
    quiet = flip(4.0, 12.0)
    contents = quiet.contents.copy()
    contents[0] = 0.0
    workload = Workload(
        name="late",
        sites=quiet.sites,
        pair_sites=quiet.pair_sites,
        pair_targets=quiet.pair_targets,
        contents=contents * 20,
        slices=quiet.slices,
        factors=quiet.factors,
    )
    (outcome,) = one(workload).outcomes
    assert outcome.replay is not None
    assert outcome.replay.n_promoted == 1
    assert outcome.hit_ratio > 0.6


def test_more_sites_than_are_learned_at_once() -> None:
    workload = synthetic("zipf:sites=3000,targets=2,skew=1.5,seconds=5")
    (outcome,) = one(workload).outcomes
    assert outcome.replay is not None
    # Most of them hardly run, and are left alone.
    assert 3 < outcome.replay.n_learning < 2000
    assert outcome.hit_ratio > 0.5


def test_windows_of_many_sites_cost_what_they_may_from_the_first_on() -> None:
    workload = synthetic("alternating:sites=300,targets=2,rate=4e8,seconds=5")
    policy = policy_named("adaptive")
    windows_hz = policy.schedule.overhead_ratio / policy.schedule.window_cost_s
    n_windows = replay(workload, policy).n_windows
    # Learning takes the first second; more than the bound would be wanted, so it is used up.
    assert 0.5 * 4.0 * windows_hz <= n_windows <= 1.2 * 4.0 * windows_hz


def test_site_that_has_not_run_has_what_its_table_learned() -> None:
    # Five sites are busy while all learn, and others of the same targets later.
    workload = synthetic("bursts:tables=1,targets=3,hot=3,phase=1,duty=1,seconds=10")
    policy = policy_named("adaptive")
    (shared,) = compare(workload, [policy]).outcomes
    (alone,) = compare(workload, [policy], engine=EngineModel(is_sharing=False)).outcomes
    assert shared.hit_ratio > 0.96 > 0.9 > alone.hit_ratio
    assert shared.replay is not None
    assert shared.replay.n_promoted == len(workload.sites)
    assert shared.replay.n_learning == len(workload.sites)  # the first window, and no other
    for tenure in shared.replay.tenures:
        if tenure.start_s >= policy.schedule.learn_s:
            assert tenure.tree != Miss()


def test_site_that_knows_itself_has_nothing_of_its_table() -> None:
    workload = synthetic("zipf:tables=2,sites=6,targets=9,seconds=5")
    policy = policy_named("adaptive")
    alone = replay(workload, policy, EngineModel(is_sharing=False))
    assert replay(workload, policy).tenures == alone.tenures


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_source_says_how_many_branches_a_site_has(name: str) -> None:
    workload = synthetic("bursts:tables=2,targets=6,hot=3,branches=2,sites=8,seconds=10")
    replayed = replay(workload, policy_named(name))
    trees = [tenure.tree for tenure in replayed.tenures if not tenure.is_counting]
    assert {len([*tree_targets(tree)]) for tree in trees} <= {0, 1, 2}
    assert replayed.n_promoted or name == "jumpswitch"  # gives up what has more targets than that


def test_same_seed_same_replay() -> None:
    workload = synthetic("bursts:seconds=10")
    policy = policy_named("adaptive")
    assert replay(workload, policy).tenures == replay(workload, policy).tenures


def test_tenures_have_no_hole_and_no_overlap() -> None:
    workload = synthetic("bursts:seconds=20")
    for name in POLICY_NAMES:
        tenures = replay(workload, policy_named(name)).tenures
        for site in range(len(workload.sites)):
            own = sorted((t.start_s, t.end_s) for t in tenures if t.site == site)
            assert own[0][0] == 0.0
            assert own[-1][1] == pytest.approx(workload.seconds)
            assert all(a[1] == b[0] for a, b in itertools.pairwise(own))


def test_memory_grows_with_cpus() -> None:
    workload = synthetic("alternating:seconds=3")
    policy = policy_named("adaptive")
    small = replay(workload, policy, EngineModel(n_cpus=1)).memory
    large = replay(workload, policy, EngineModel(n_cpus=255)).memory
    assert large.peak_table_size == 128 * small.peak_table_size
    assert large.peak_code_size == small.peak_code_size > 0


# --- the model is the engine's


def test_numbers_are_those_of_the_controller() -> None:
    engine, config = EngineModel(), Config()
    assert (engine.poll_s, engine.wave_s) == (config.poll_s, config.wave_s)
    assert engine.relearn_s == config.relearn_s
    assert engine.look_s == sampling.LOOK_S
    assert engine.max_due == sampling.MAX_DUE
    assert engine.review_every_s == sampling.REVIEW_EVERY_S
    assert engine.all_at_once_sites == hot_sites.ALL_AT_ONCE_SITES
    assert engine.hot_hz == hot_sites.LEARN_HZ
    assert engine.hot_wave_s == hot_sites.WAVE_S
    assert (engine.first_rest_s, engine.last_rest_s) == (
        hot_sites.FIRST_REST_S,
        hot_sites.LAST_REST_S,
    )
    assert engine.thunk_look_every_s == rediscovery.LOOK_EVERY_S
    assert engine.n_calm_looks == rediscovery.CALM_LOOKS
    assert engine.calm_look_every_s == rediscovery.CALM_LOOK_EVERY_S
    assert engine.thunk_look_s == rediscovery.LOOK_S
    assert engine.thunk_look_hz == rediscovery.LOOK_HZ
    assert engine.after_finds_s == rediscovery.AFTER_FINDS_S
    assert engine.after_nothing_s == rediscovery.AFTER_NOTHING_S
    assert engine.thunk_s == rediscovery.MISS_S
    assert simulated_sampling.GOLDEN_RATIO == sampling.GOLDEN_RATIO
    assert windows.SAMPLE_OPEN_SLOTS == learning.SAMPLE_OPEN_SLOTS
    assert windows.MIN_WINDOW_COUNT == window_counts.MIN_WINDOW_COUNT
    assert windows.MAX_COUNTED_TARGETS == growing.MAX_COUNTED_TARGETS


class _Literals:
    """Literals somewhere."""

    def addr_of(self, value: int) -> Addr:
        """Return the address of a literal."""
        return Addr(0x700000)


def _counts(n: int) -> list[Count]:
    """Return counts of n targets, scattered."""
    return [
        Count(target=Addr(0x401000 + 64 * (i * 7919 % 1024)), hit_count=1000 // (1 + i) + 20)
        for i in range(n)
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 8, 16, 32, 64, 128])
def test_size_of_promoted_blocks(n: int) -> None:
    plan = BlockPlan(
        operand="rax",
        tree=plan_tree(_counts(n), 0, MODEL).tree,
        thunk_addr=Addr(0x401500),
        miss_count_addr=Addr(0x600000),
    )
    real = len(encode_block(plan, Addr(0x500000), _Literals()).code)
    # How much int3 fills lines hangs on the shape of the tree.
    assert promoted_block_size(n) == pytest.approx(real, rel=0.17, abs=16)


@pytest.mark.parametrize("n_open", [2, 8, 64])
@pytest.mark.parametrize("n", [0, 1, 2, 6, 24, 80, 128])
def test_size_of_counting_blocks(n: int, n_open: int) -> None:
    plan = plan_counting(
        operand="rax",
        thunk_addr=Addr(0x401500),
        tree=balance_tree(_counts(n)),
        n_open=n_open,
        cells_addr=Addr(0x600000),
        rows=CounterRows(
            shared_addr=Addr(0x600000),
            row_shift=19,
            n_cpus=2,
            rseq=RseqAbi(offset=-160, signature=0x53053053),
        ),
        is_below_stack_free=True,
    )
    assert len(list(tree_targets(plan.tree))) == n
    real = len(encode_block(plan, Addr(0x500000), _Literals()).code)
    assert counting_block_size(n, n_open) == pytest.approx(real, rel=0.1, abs=16)


# --- projection


@pytest.mark.parametrize("n_sites", [1, 1000, 5000, 100_000, 1_000_000])
def test_rows_are_those_of_the_arena(n_sites: int) -> None:
    assert row_size(n_sites) == 1 << ArenaGeometry.for_sites(n_sites, 2).row_shift


def test_projection_follows_what_was_measured() -> None:
    measured = Measured(poll_s=((1000, 1e-5), (10_000, 1e-4)), read_cell_s=1e-8, decide_s=1e-4)
    policy = policy_named("adaptive")
    small, wide, large = project(policy, measured, (1000, 1_000_000), (1, 256))[:3]
    assert (small.n_sites, wide.n_cpus, large.n_sites) == (1000, 256, 1_000_000)
    assert wide.reserved_size == small.reserved_size * 257 / 2
    assert small.poll_ratio == pytest.approx(1e-5 / 0.125)
    # Not measured: a hundred times what 10,000 sites take.
    assert large.poll_ratio == pytest.approx(1e-2 / 0.125)
    # The bound on overhead holds for any number of sites.
    assert large.windows_hz <= policy.schedule.overhead_ratio / policy.schedule.window_cost_s
    assert large.table_size <= large.reserved_size


def test_who_never_looks_has_no_windows() -> None:
    measured = Measured(poll_s=((1000, 1e-5),), read_cell_s=1e-8, decide_s=1e-4)
    (found,) = project(policy_named("llvm"), measured, (1000,), (1,))
    assert found.windows_hz == found.window_ratio == 0.0
