# SPDX-License-Identifier: Apache-2.0
"""The builder of restartable sequences, used for an operation that no block has."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import count

import pytest

from optpoline.model import Miss
from optpoline.x86.counter_insns import CounterAssembler
from optpoline.x86.restartable import RestartableSection
from tests.emulate.block_kinds import (
    COUNTERS_SIZE,
    KINDS,
    LAYOUTS,
    Image,
    LiteralTable,
    Way,
    rows_of,
)
from tests.emulate.block_runs import pack_cells, unpack_cells
from tests.emulate.machine import NO_CPU, Machine, random_state

LAYOUT = LAYOUTS[1]


def encode_push_image() -> Image:
    """Return code that pushes rdx on a CPU's stack of two, unless it is the last one pushed.

    Word 0 says how many there are; the values follow.
    """
    rows = rows_of(LAYOUT, Way.CALL)
    literals = LiteralTable(LAYOUT.literal_addr)
    asm = CounterAssembler(LAYOUT.block_addr)
    section = RestartableSection(asm, rows, literals, scratch="rax")
    same, full = asm.label(), asm.label()
    section.begin()
    section.load_row()
    section.compare_equal(8, "rdx", same)
    section.compare_not_zero(0, full)
    section.store(8, "rdx")
    section.commit_increment(0)
    asm.bind(same)
    asm.bind(full)
    section.end()
    asm.jump(LAYOUT.thunk_addr)
    section.abort()
    asm.jump(LAYOUT.other_addr)
    block = asm.finish_block()
    return Image(
        plan=replace(KINDS["empty"](LAYOUT, "rdx"), tree=Miss()),
        layout=LAYOUT,
        code=block.code,
        text=block.code[: block.text_size],
        literals=literals,
    )


def test_an_operation_commits_or_leaves_for_its_handler() -> None:
    rng = random.Random(7)
    machine = Machine(encode_push_image())
    rows = rows_of(LAYOUT, Way.CALL)
    for pushed, last in ((0, 0), (0, 5), (1, 5), (0, 9)):
        cells = unpack_cells(bytes(COUNTERS_SIZE), LAYOUT)
        row = rows.cell_of_cpu(rows.shared_addr, 2)
        cells[row], cells[row + 8] = pushed, last
        state = random_state(rng, "rdx", 9, pack_cells(cells), 2).with_rseq_cs(0)
        done = dict(cells)
        if not pushed and last != 9:
            done[row], done[row + 8] = 1, 9
        for n_steps in count():
            machine.enter(state)
            for _ in range(n_steps):
                if not machine.is_left:
                    machine.step()
            if machine.is_left:
                break
            was_done = machine.read_state().counters == pack_cells(done)
            is_disturbed = machine.return_to_user(2)
            machine.step_out()
            after = machine.read_state()
            assert after.rseq_cs == 0
            if is_disturbed:
                assert after.pc == LAYOUT.other_addr
                assert unpack_cells(after.counters, LAYOUT)[row] == pushed
            else:
                assert after.pc == LAYOUT.thunk_addr
                assert after.counters == pack_cells(done)
                assert was_done or n_steps < 3


def test_a_thread_without_a_row_goes_to_the_handler() -> None:
    rng = random.Random(8)
    machine = Machine(encode_push_image())
    counters = bytes(COUNTERS_SIZE)
    for cpu in (NO_CPU, rows_of(LAYOUT, Way.CALL).n_cpus):
        state = random_state(rng, "rdx", 9, counters, cpu)
        after = machine.run(state)
        assert (after.pc, after.counters) == (LAYOUT.other_addr, counters)
        assert after.rseq_cs == 0


def test_no_sequences_where_threads_are_not_registered() -> None:
    asm = CounterAssembler(LAYOUT.block_addr)
    literals = LiteralTable(LAYOUT.literal_addr)
    with pytest.raises(ValueError, match="registered"):
        RestartableSection(asm, rows_of(LAYOUT, Way.SEGMENT), literals, scratch="rax")
