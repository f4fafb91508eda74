# SPDX-License-Identifier: Apache-2.0
"""Every kind of emitted block on an emulated CPU, beside the instruction it stands for.

The original comes to its thunk with nothing changed, and from there to where the operand
points. So a block must come to the operand's address or to the thunk, and leave registers,
vectors, stack and memory as they were; arithmetic flags may differ, and so may the operand
at a target where the plan says that it is dead. What it counts is compared with a model.

States are random; operands are each target, what is nearly one, and what is far from all.
Registers and flags change with every case, memory and vectors with every batch of cases, in
which counts add up; memory is compared after a batch.
"""

from __future__ import annotations

import importlib.util
import random
import time
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torture.errors import TortureError
from torture.row import Figure, Outcome, Scale

if TYPE_CHECKING:
    from tests.emulate.block_kinds import Layout
    from tests.emulate.machine import State

__all__ = ["ROW", "EmulationRow"]

_FULL_CASES = 100_000
_BATCH = 100
_LEAST_PLACES = 12
_MAX_TOLD = 5


@dataclass(slots=True)
class _Tally:
    """What came out for one kind."""

    n_cases: int = 0
    n_different: int = 0
    told: list[str] = field(default_factory=list)

    def add_difference(self, what: str) -> None:
        """Count a difference; tell the first ones."""
        self.n_different += 1
        if len(self.told) < _MAX_TOLD:
            self.told.append(what)


@dataclass(frozen=True, slots=True, kw_only=True)
class EmulationRow:
    """The row ``emulation``."""

    name: str = "emulation"
    about: str = "every kind of block in an emulated CPU, compared with the original instruction"
    quick_s: float = 15.0
    full_s: float = 600.0

    def run(self, scale: Scale) -> Outcome:
        """Run the cases of each kind over all layouts and operands."""
        begin_s = time.monotonic()
        if importlib.util.find_spec("unicorn") is None:
            raise TortureError("unicorn is not installed: make setup")
        # Not before: the emulator is not there where only other rows are run.
        from tests.emulate.block_kinds import KINDS, LAYOUTS, OPERANDS

        rng = random.Random(scale.seed)
        places = [(layout, operand) for layout in LAYOUTS for operand in OPERANDS]
        # A new emulated CPU costs as much as twenty cases: few cases are not spread thin.
        places = rng.sample(places, scale.of(len(places), least=_LEAST_PLACES))
        n_each = -(-scale.of(_FULL_CASES, least=_BATCH * _LEAST_PLACES) // len(places))
        tallies = {kind: _Tally() for kind in KINDS}
        for kind, tally in tallies.items():
            for layout, operand in places:
                _run_block(kind, layout, operand, n_each, rng, tally)
        n_least = min(tally.n_cases for tally in tallies.values())
        n_bar = n_each * len(places)
        n_different = sum(tally.n_different for tally in tallies.values())
        return Outcome(
            row=self.name,
            scale=f"{n_bar:,} of {_FULL_CASES:,} cases of each of {len(tallies)} kinds",
            figures=(
                Figure(
                    name="fewest cases of a kind",
                    value=f"{n_least:,}",
                    bar=f"≥ {min(n_bar, _FULL_CASES):,}",
                    is_met=n_least >= min(n_bar, _FULL_CASES),
                ),
                Figure(
                    name="differences from the original instruction",
                    value=f"{n_different:,}",
                    bar="0",
                    is_met=n_different == 0,
                ),
            ),
            notes=_tell(tallies),
            seconds=time.monotonic() - begin_s,
        )


def _run_block(
    kind: str, layout: Layout, operand: str, n_cases: int, rng: random.Random, tally: _Tally
) -> None:
    """Run one kind of block at one place, in batches, one emulated CPU for all."""
    from optpoline.model import tree_targets
    from optpoline.x86.assembler import REGISTER_NUMBERS
    from tests.emulate import block_runs
    from tests.emulate.block_kinds import KINDS, encode_image
    from tests.emulate.block_model import run_plan
    from tests.emulate.machine import ARITHMETIC_FLAGS, Machine, random_state

    plan = KINDS[kind](layout, operand)
    machine = Machine(encode_image(plan, layout))
    values = block_runs.interesting_values(plan, layout, rng)
    hits = list(tree_targets(plan.tree)) or values
    number = REGISTER_NUMBERS[operand]
    for start in range(0, n_cases, _BATCH):
        counters = block_runs.random_counters(plan, layout, rng)
        memory = random_state(rng, operand, 0, counters)
        machine.load(memory)
        cells = block_runs.unpack_cells(counters, layout)
        cpu = block_runs.seen_cpu(plan, memory.cpu)
        state = memory
        for i in range(start, min(start + _BATCH, n_cases)):
            value = rng.choice(hits if i % 2 else values)
            registers = [rng.getrandbits(64) for _ in memory.registers]
            registers[REGISTER_NUMBERS["rsp"]] = memory.registers[REGISTER_NUMBERS["rsp"]]
            registers[number] = value
            flags = memory.flags & ~ARITHMETIC_FLAGS | rng.getrandbits(12) & ARITHMETIC_FLAGS
            tally.n_cases += 1
            expected_pc = run_plan(plan, value, cells, cpu)
            before = tuple(registers)
            state = replace(state, registers=before)
            state = replace(state, stack=block_runs.expected_stack(plan, state))
            try:
                pc, new_flags, after = machine.go_on(before, flags)
            except AssertionError as error:
                tally.add_difference(f"{layout.name} {operand} {value:#x}: {error}")
                continue
            is_same = (
                pc == expected_pc
                and pc in (value, plan.thunk_addr)
                and after == block_runs.expected_registers(plan, pc, before)
                and new_flags & ~ARITHMETIC_FLAGS == flags & ~ARITHMETIC_FLAGS
            )
            if not is_same:
                tally.add_difference(f"{layout.name} {operand} {value:#x} came to {pc:#x}")
        left = machine.read_state()
        expected = replace(state, counters=block_runs.pack_cells(cells), fixed=machine.fixed)
        if _memory_of(left) != _memory_of(expected):
            tally.add_difference(f"{layout.name} {operand}: memory or vectors after a batch")


def _memory_of(state: State) -> tuple[bytes, bytes, bytes, tuple[int, ...]]:
    """Return what is compared after a batch."""
    return state.stack, state.counters, state.fixed, state.vectors


def _tell(tallies: dict[str, _Tally]) -> tuple[str, ...]:
    """Say how many cases each kind had, and what was different first."""
    cases = ", ".join(f"{kind} {tally.n_cases:,}" for kind, tally in tallies.items())
    different = (
        f"{kind}: {told}" for kind, tally in tallies.items() for told in tally.told if told
    )
    return (f"cases: {cases}", *different)


ROW = EmulationRow()
