# SPDX-License-Identifier: Apache-2.0
"""Every kind of block on an emulated CPU: where it goes and what it leaves alone.

``OPTPOLINE_EMULATE_RUNS`` sets how many runs each kind gets (default 180).
"""

from __future__ import annotations

import os
import random

import pytest

from optpoline.model import SLOT_CLAIMED, tree_targets
from tests.emulate.block_kinds import (
    COUNTERS_SIZE,
    KINDS,
    LAYOUTS,
    OPERANDS,
    Layout,
    encode_image,
)
from tests.emulate.block_model import run_plan
from tests.emulate.block_runs import (
    check_run,
    interesting_values,
    pack_cells,
    random_counters,
    unpack_cells,
)
from tests.emulate.machine import NO_CPU, Machine, random_state

N_RUNS = int(os.environ.get("OPTPOLINE_EMULATE_RUNS", "60"))


@pytest.mark.parametrize("kind", KINDS)
def test_block_goes_where_its_plan_says_and_changes_nothing_else(kind: str) -> None:
    rng = random.Random(f"{kind}")
    combinations = [(layout, operand) for layout in LAYOUTS for operand in OPERANDS]
    n_runs = max(2, N_RUNS // len(combinations))
    for layout, operand in combinations:
        plan = KINDS[kind](layout, operand)
        machine = Machine(encode_image(plan, layout))
        values = interesting_values(plan, layout, rng)
        hits = list(tree_targets(plan.tree))
        for i in range(n_runs):
            # Every second run is a hit where the block has guards.
            pool = hits if hits and i % 2 else values
            counters = random_counters(plan, layout, rng)
            state = random_state(rng, operand, rng.choice(pool), counters)
            check_run(machine, plan, layout, state)


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", KINDS)
def test_each_target_and_each_neighbour_of_one(kind: str, layout: Layout) -> None:
    rng = random.Random(f"{kind} {layout.name}")
    operand = rng.choice(OPERANDS)
    plan = KINDS[kind](layout, operand)
    machine = Machine(encode_image(plan, layout))
    for value in interesting_values(plan, layout, rng):
        counters = random_counters(plan, layout, rng)
        check_run(machine, plan, layout, random_state(rng, operand, value, counters))


def test_counting_block_learns_what_comes_by() -> None:
    layout, operand = LAYOUTS[1], "r11"
    rng = random.Random(5)
    plan = KINDS["learn-first"](layout, operand)
    machine = Machine(encode_image(plan, layout))
    counters = bytes(COUNTERS_SIZE)
    cells = unpack_cells(counters, layout)
    for _ in range(300):
        target = layout.targets[min(int(rng.expovariate(0.7)), 15)]
        cpu = rng.choice((0, 2, 3, NO_CPU))
        assert run_plan(plan, target, cells, cpu) == layout.thunk_addr
        counters = machine.run(random_state(rng, operand, target, counters, cpu)).counters
    assert counters == pack_cells(cells)
    assert plan.rows is not None
    assert plan.miss_count_addr is not None
    counted = 0
    for row in (0, 1, 3, 4):
        off = row << plan.rows.row_shift
        slots = [(slot.target_addr + off, slot.count_addr + off) for slot in plan.open_slots]
        assert {cells[target_addr] for target_addr, _ in slots} < set(layout.targets)
        counts = [cells[count_addr] & SLOT_CLAIMED - 1 for _, count_addr in slots]
        assert min(counts) > 0
        counted += sum(counts) + cells[plan.miss_count_addr + off]
    assert counted == 300
