# SPDX-License-Identifier: Apache-2.0
"""Relocated blocks are what the encoder would have made, byte for byte."""

from __future__ import annotations

from dataclasses import replace
from random import Random

import pytest

from optpoline.errors import EncodeRangeError
from optpoline.learn.counting import n_cells, plan_counting
from optpoline.model import (
    Addr,
    BlockPlan,
    Guard,
    Miss,
    OpenSlot,
    OperandLoad,
    TreeNode,
    tree_targets,
)
from optpoline.x86 import templates
from optpoline.x86.assembler import LINE_SIZE, BlockCode, Relocation
from optpoline.x86.blocks import encode_block, place_block
from optpoline.x86.restartable import LiteralPool
from optpoline.x86.templates import MAX_GUARDS, BlockTemplates
from tests.emulate.block_kinds import KINDS, LAYOUTS, Layout, LiteralTable, Way, rows_of

FIXED, PIE = LAYOUTS[:2]
ENCODED_EACH_TIME = {
    *("long-chain", "tree", "tree-turned"),  # too many targets
    *("leafy", "leafy-turned", "leafy-mixed", "split-misses"),
    *("mixed", "mixed-turned", "learn-mixed", "learn-turned", "part-counted"),
    *("based-tree", "based-leafy", "based-mixed", "based-counted"),
    *("traced", "traced-far", "traced-segment"),
}


def moved_cells(plan: BlockPlan, size: int) -> BlockPlan:
    """Return a plan with its cells elsewhere in the same rows."""
    if plan.miss_count_addr is None:
        return plan
    return replace(
        plan,
        hit_count_addrs=tuple((target, Addr(addr + size)) for target, addr in plan.hit_count_addrs),
        miss_count_addr=Addr(plan.miss_count_addr + size),
        open_slots=tuple(
            OpenSlot(
                target_addr=Addr(slot.target_addr + size), count_addr=Addr(slot.count_addr + size)
            )
            for slot in plan.open_slots
        ),
    )


def moved(layout: Layout, step: int) -> Layout:
    """Return a layout with block, thunk and targets elsewhere, each by another distance."""
    return replace(
        layout,
        block_addr=Addr(layout.block_addr + 0x1040 * step),
        thunk_addr=Addr(layout.thunk_addr + 0x120 * step),
        targets=tuple(Addr(t + 0x30 * step + i) for i, t in enumerate(layout.targets)),
    )


def load_of(operand: str, layout: Layout, step: int) -> OperandLoad | None:
    """Return what loads an operand: nothing, or what depends on where it is, or does not."""
    if operand == "rax":
        return None
    if operand == "rsi":
        # mov disp32(%rip), %rsi
        data_addr = Addr(layout.counter_addr + 0x8000 + 0x17 * step)
        return OperandLoad(code=bytes.fromhex("48 8b 35 00 00 00 00"), data_addr=data_addr)
    # mov 0x10(%rbx), %r12
    return OperandLoad(code=bytes.fromhex("4c 8b a3 10 00 00 00"))


class Encoded:
    """Counts how often the encoder is asked."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """Stand in for it."""
        self.n_calls = 0
        monkeypatch.setattr(templates, "encode_block", self)

    def __call__(
        self,
        plan: BlockPlan,
        addr: Addr,
        literals: LiteralPool,
        relocations: list[Relocation] | None = None,
    ) -> BlockCode:
        self.n_calls += 1
        return encode_block(plan, addr, literals, relocations)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
def test_every_kind_is_relocated(
    kind: str, layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    encoded = Encoded(monkeypatch)
    for operand in ("rax", "rsi", "r12"):
        encoded.n_calls = 0
        literals = LiteralTable(layout.literal_addr)
        made = BlockTemplates(literals)
        for step in range(4):
            there = moved(layout, step)
            plan = moved_cells(KINDS[kind](there, operand), 0x48 * step)
            plan = replace(plan, load=load_of(operand, there, step))
            wanted = encode_block(plan, there.block_addr, literals)
            assert made.encode(plan, there.block_addr) == wanted
        if layout in (FIXED, PIE):
            assert encoded.n_calls == (4 if kind in ENCODED_EACH_TIME else 1)


def random_tree(random: Random, targets: list[Addr]) -> TreeNode:
    """Return any tree of guards."""
    if not targets or random.random() < 0.1:
        return Miss()
    at = random.randrange(len(targets))
    below, above = targets[:at], targets[at + 1 :]
    if random.random() < 0.5:
        return Guard(targets[at], None, random_tree(random, below + above))
    turned = random.random() < 0.5
    return Guard(targets[at], random_tree(random, below), random_tree(random, above), turned)


def random_plan(random: Random, layout: Layout) -> BlockPlan:
    """Return a plan as sessions make them, for some place in an arena."""
    n_targets = random.choice((0, 0, 1, 1, 1, 2, 3, MAX_GUARDS, MAX_GUARDS + 1))
    # Some fit an immediate and some do not.
    near = random.sample(range(0x40_1000, 0x60_0000), n_targets)
    far = random.sample(range(0x8000_0000, 0x9000_0000), n_targets)
    targets = sorted(Addr(random.choice(pair)) for pair in zip(near, far, strict=True))
    tree = random_tree(random, targets)
    operand = random.choice(("rax", "rcx", "r11"))
    load = load_of(random.choice(("rax", "rsi", "r12")), layout, random.randrange(9))
    thunk = Addr(random.choice((0x40_0000, 0x60_0000)))
    cells = Addr(layout.counter_addr + 8 * random.randrange(400))
    if random.random() < 0.4:
        return BlockPlan(
            operand=operand, tree=tree, thunk_addr=thunk, miss_count_addr=cells, load=load
        )
    n_open = random.choice((0, 2, 2, 3))
    assert n_cells(n_targets, n_open) < 112
    return plan_counting(
        operand=operand,
        thunk_addr=thunk,
        tree=tree,
        n_open=n_open,
        cells_addr=cells,
        rows=rows_of(layout, random.choice((Way.CALL, Way.SEGMENT))),
        is_below_stack_free=random.random() < 0.5,
        thunk_targets=frozenset(t for t in tree_targets(tree) if random.random() < 0.1),
        load=load,
    )


def test_blocks_of_all_sorts_in_any_order(monkeypatch: pytest.MonkeyPatch) -> None:
    random = Random(7)
    encoded = Encoded(monkeypatch)
    literals = LiteralTable(FIXED.literal_addr)
    made = BlockTemplates(literals)
    n_blocks = 600
    for _ in range(n_blocks):
        plan = random_plan(random, FIXED)
        addr = Addr(FIXED.block_addr + 8 * random.randrange(4096))
        assert made.encode(plan, addr) == encode_block(plan, addr, literals)
    assert encoded.n_calls < n_blocks * 0.9


def test_size_is_known_before_the_place() -> None:
    random = Random(11)
    literals = LiteralTable(FIXED.literal_addr)
    made = BlockTemplates(literals)
    n_beside = n_longer = 0
    for _ in range(200):
        plan = random_plan(random, FIXED)
        line, other = (Addr(FIXED.block_addr + 64 * random.randrange(512)) for _ in range(2))
        draft = made.draft(plan, line)
        # Who has records starts a line, as do those that fit none; the others lie in one.
        least = 1 if plan.rows is None else LINE_SIZE + 1
        beside = [place_block(other + off, max(draft.size, least)) for off in (16, 32, 48)]
        assert {len(draft.encode(place).code) for place in (line, *beside)} == {draft.size}
        n_beside += beside[0] % LINE_SIZE != 0
        # Where nobody puts it the draft still is what the encoder makes there.
        for off in (16, 32, 48):
            addr = Addr(other + off)
            wanted = encode_block(plan, addr, literals)
            assert draft.encode(addr) == wanted
            n_longer += len(wanted.code) > draft.size
    assert n_beside > 20
    assert n_longer > 20


def test_what_is_out_of_reach_is_refused() -> None:
    made = BlockTemplates(LiteralTable(PIE.literal_addr))
    plan = KINDS["one-counted"](PIE, "rax")
    made.encode(plan, PIE.block_addr)
    far = replace(plan, tree=Guard(Addr(PIE.block_addr + (1 << 31) + 64), None, Miss()))
    with pytest.raises(EncodeRangeError):
        made.encode(far, PIE.block_addr)
    assert made.encode(plan, PIE.block_addr) == encode_block(
        plan, PIE.block_addr, LiteralTable(PIE.literal_addr)
    )


@pytest.mark.parametrize("layout", [FIXED, PIE], ids=lambda layout: layout.name)
def test_a_target_that_is_the_thunk_is_no_template(layout: Layout) -> None:
    literals = LiteralTable(layout.literal_addr)
    made = BlockTemplates(literals)
    plan = KINDS["one-counted"](layout, "rax")
    odd = replace(plan, thunk_addr=layout.targets[0])
    for each in (odd, plan, odd):
        wanted = encode_block(each, layout.block_addr, literals)
        assert made.encode(each, layout.block_addr) == wanted


def test_templates_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(templates, "MAX_TEMPLATES", 2)
    literals = LiteralTable(FIXED.literal_addr)
    made = BlockTemplates(literals)
    for operand in ("rax", "rcx", "rdx", "rsi", "rax"):
        plan = KINDS["learn-first"](FIXED, operand)
        wanted = encode_block(plan, FIXED.block_addr, literals)
        assert made.encode(plan, FIXED.block_addr) == wanted
