# SPDX-License-Identifier: Apache-2.0
"""A head turned into a jump: who comes goes elsewhere, who is inside goes on as before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from optpoline.model import tree_targets
from optpoline.x86.blocks import HEAD_SIZE, POISON, encode_redirect
from tests.emulate.block_kinds import KINDS, LAYOUTS, OPERANDS, Image, Layout, encode_image
from tests.emulate.block_runs import interesting_values, random_counters
from tests.emulate.disassemble import disassemble
from tests.emulate.machine import Machine, random_state


@pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
@pytest.mark.parametrize("kind", KINDS)
def test_redirected_head(kind: str, layout: Layout) -> None:
    rng = random.Random(f"{kind} {layout.name}")
    # Instructions on rax have forms of their own, one byte shorter.
    for operand in ("rax", rng.choice(OPERANDS[1:])):
        check_redirected(kind, layout, operand, rng)


def check_redirected(kind: str, layout: Layout, operand: str, rng: random.Random) -> None:
    """Run a redirected block from its head, and from inside."""
    plan = KINDS[kind](layout, operand)
    image = encode_image(plan, layout)
    padded = image.code.ljust(HEAD_SIZE, bytes((POISON,)))
    word = encode_redirect(padded[:HEAD_SIZE], layout.block_addr, layout.other_addr)
    redirected = word.to_bytes(8, "little") + padded[HEAD_SIZE:]
    old, new = Machine(image), Machine(image, redirected)
    values = interesting_values(plan, layout, rng)
    for value in rng.sample(values, 3):
        before = random_state(rng, operand, value, random_counters(plan, layout, rng))
        # Not even flags change on the way to the other block.
        assert new.run(before) == replace(before, pc=layout.other_addr, fixed=new.fixed)
    if plan.rows is None:
        check_from_anywhere(image, old, new, values, rng)
    else:
        check_from_inside(image, old, new, values, rng)


def check_from_anywhere(
    image: Image, old: Machine, new: Machine, values: list[int], rng: random.Random
) -> None:
    """Run a promoted block from each of its instructions, with whatever it finds there."""
    plan, layout = image.plan, image.layout
    insns = disassemble(image.text, layout.block_addr)
    starts = [insn.off for insn in insns if insn.mnemonic != "int3"]
    assert starts[0] == 0
    for off in starts[1:]:
        for value in rng.sample(values, 3):
            counters = random_counters(plan, layout, rng)
            before = random_state(rng, plan.operand, value, counters)
            assert new.run(before, off) == replace(old.run(before, off), fixed=new.fixed)


def check_from_inside(
    image: Image, old: Machine, new: Machine, values: list[int], rng: random.Random
) -> None:
    """Redirect a learning block under threads that are inside, from its head on."""
    plan, layout = image.plan, image.layout
    hits = list(tree_targets(plan.tree))
    for value in (*rng.sample(hits, min(2, len(hits))), rng.choice(values)):
        before = random_state(rng, plan.operand, value, random_counters(plan, layout, rng))
        for n_steps in (1, 2, *sorted(rng.sample(range(3, 40), 8))):
            old.enter(before.with_rseq_cs(0))
            for _ in range(n_steps):
                if not old.is_left:
                    old.step()
            if old.is_left:
                break
            new.load(old.read_state())
            new.set_context(old.context())
            new.step_out()
            old.step_out()
            assert new.read_state() == replace(old.read_state(), fixed=new.fixed)
