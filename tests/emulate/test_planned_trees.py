# SPDX-License-Identifier: Apache-2.0
"""Trees as they are planned from any counts, encoded and run."""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from optpoline.learn.counting import plan_counting
from optpoline.model import Addr, BlockPlan, Count
from optpoline.promote.cost import CostModel
from optpoline.promote.tree import plan_tree
from tests.emulate.block_kinds import (
    LAYOUTS,
    OPERANDS,
    Layout,
    Way,
    encode_image,
    rows_of,
)
from tests.emulate.block_runs import check_run, interesting_values, random_counters
from tests.emulate.machine import Machine, random_state


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    layout=st.sampled_from(LAYOUTS),
    operand=st.sampled_from(OPERANDS),
    hits=st.dictionaries(st.integers(0, 15), st.integers(0, 1 << 20), max_size=16),
    extra=st.dictionaries(st.integers(1, 1 << 16), st.integers(1, 1 << 20), max_size=60),
    n_misses=st.integers(0, 1000),
    way=st.sampled_from((None, *Way)),
    seed=st.integers(0, 1 << 32),
)
def test_planned_tree_runs_as_its_model(
    layout: Layout,
    operand: str,
    hits: dict[int, int],
    extra: dict[int, int],
    n_misses: int,
    way: Way | None,
    seed: int,
) -> None:
    counts = {layout.targets[i]: n for i, n in hits.items()}
    counts |= {Addr(layout.targets[0] + off): n for off, n in extra.items()}
    planned = plan_tree(
        [Count(target=target, hit_count=n) for target, n in counts.items()],
        n_misses,
        CostModel(min_gain_cycles=0.0),
    )
    if way is not None:
        plan = plan_counting(
            operand=operand,
            thunk_addr=layout.thunk_addr,
            tree=planned.tree,
            n_open=2,
            cells_addr=layout.counter_addr,
            rows=rows_of(layout, way),
            is_below_stack_free=way is Way.CALL,
        )
    else:
        plan = BlockPlan(
            operand=operand,
            tree=planned.tree,
            thunk_addr=layout.thunk_addr,
            miss_count_addr=layout.counter_addr,
        )
    rng = random.Random(seed)
    machine = Machine(encode_image(plan, layout))
    values = interesting_values(plan, layout, rng)
    for value in (*planned.targets, *rng.sample(values, 24)):
        counters = random_counters(plan, layout, rng)
        check_run(machine, plan, layout, random_state(rng, operand, value, counters))
