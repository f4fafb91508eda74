# SPDX-License-Identifier: Apache-2.0
"""A head turned into a jump: who comes goes elsewhere, who is inside goes on as before."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from optpoline.x86.blocks import HEAD_SIZE, POISON, encode_redirect
from tests.emulate.block_kinds import KINDS, LAYOUTS, OPERANDS, Layout, encode_image
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
    """Run a redirected block from each of its instructions."""
    plan = KINDS[kind](layout, operand)
    image = encode_image(plan, layout)
    padded = image.code.ljust(HEAD_SIZE, bytes((POISON,)))
    word = encode_redirect(padded[:HEAD_SIZE], layout.block_addr, layout.other_addr)
    redirected = word.to_bytes(8, "little") + padded[HEAD_SIZE:]
    old, new = Machine(image), Machine(image, redirected)
    values = interesting_values(plan, layout, rng)
    insns = disassemble(image.code, layout.block_addr)
    starts = [insn.off for insn in insns if insn.mnemonic != "int3"]

    assert starts[0] == 0
    for off in starts:
        for value in rng.sample(values, 3):
            counters = random_counters(plan, layout, rng)
            before = random_state(rng, operand, value, counters)
            after = new.run(before, off)
            if off == 0:
                # Not even flags change on the way to the other block.
                assert after == replace(before, pc=layout.other_addr, fixed=new.fixed)
            else:
                expected = old.run(before, off)
                assert after == replace(expected, fixed=new.fixed)
