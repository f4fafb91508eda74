# SPDX-License-Identifier: Apache-2.0
"""Which instructions each form executes: as built, and while a controller has changed it.

What is claimed is an equation: this form executes what that one does, and these instructions.
Where no controller is near, callgrind counts the same rounds a second time.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.callgrind import count_executed
from bench.commands import run_command
from bench.declared.program import FORMS, LAYOUTS, Calls, build_calls, changed
from bench.declared.walk import Executed, walk_round
from bench.errors import BenchError
from bench.figures import Figure

__all__ = ["measure_declared_instructions"]

_N_ROUNDS = 20_000

Rounds = Mapping[str, Sequence[Executed]]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Equation:
    """What a form executes, in terms of another.

    Attributes:
        name: What is claimed.
        form: The form.
        like: The form it is compared with, as built.
        more: Mnemonics of the instructions that it executes besides.
    """

    name: str
    form: str
    like: str
    more: tuple[str, ...] = ()


_AS_BUILT = (
    _Equation(name="dynamic_call, retpolines = retpoline", form="dynamic", like="retpoline"),
    _Equation(
        name="dynamic_call, plugin = call through a pointer", form="dynamic_plain", like="pointer"
    ),
    _Equation(name="static key, off = no key + nop", form="key", like="empty", more=("nopl",)),
    _Equation(
        name="static call, inline, never set = direct call + jmp",
        form="static_inline",
        like="direct",
        more=("jmp",),
    ),
)
_CHANGED = (
    _Equation(name="static call, inline, set = direct call", form="static_inline", like="direct"),
    _Equation(
        name="static call, out-of-line, set = direct call + jmp",
        form="static_out_of_line",
        like="direct",
        more=("jmp",),
    ),
    _Equation(
        name="static key, on = what it switches + jmp there and back",
        form="key",
        like="empty",
        more=("add", "jmp", "jmp"),
    ),
    _Equation(
        name="dynamic_call, retpolines, promoted = direct call + cmp, je",
        form="dynamic",
        like="direct",
        more=("cmp", "je"),
    ),
    _Equation(
        name="dynamic_call, plugin, promoted = direct call + cmp, je",
        form="dynamic_plain",
        like="direct",
        more=("cmp", "je"),
    ),
)


def measure_declared_instructions() -> Iterator[Figure]:
    """Step through each form, as built and changed."""
    executable = build_calls(LAYOUTS[0])
    with Calls(executable) as calls:
        built = {form: walk_round(calls, form) for form in FORMS}
    with Calls(executable) as calls, changed(calls):
        now = {form: walk_round(calls, form) for form in FORMS}
    for equation in _AS_BUILT:
        yield _check(equation, built, built)
    for equation in _CHANGED:
        yield _check(equation, now, built)
    yield Figure(
        name="forms of which callgrind counts another number of instructions, as built",
        value=float(sum(_count(executable, form) != len(built[form]) for form in FORMS)),
        unit=f"of {len(FORMS)}",
        bar=0.0,
    )


def _check(equation: _Equation, rounds: Rounds, built: Rounds) -> Figure:
    """Count the instructions by which an equation is wrong."""
    left = Counter(one.mnemonic for one in rounds[equation.form])
    right = Counter(one.mnemonic for one in built[equation.like])
    right.update(equation.more)
    return Figure(
        name=f"{equation.name}: of {left.total()} instructions a round, those that differ",
        value=float((left - right).total() + (right - left).total()),
        unit="instructions",
        bar=0.0,
    )


def _count(executable: Path, form: str) -> float:
    """Return the instructions of one round by callgrind."""

    def count(n_rounds: int) -> int:
        def run(in_front: Sequence[str]) -> str:
            return run_command([*in_front, str(executable), form, str(n_rounds)])

        executed, result = count_executed(executable, run)
        if not result.strip().isdecimal():
            raise BenchError(f"{form} computed {result[:80]!r}")
        return sum(executed.values())

    return (count(2 * _N_ROUNDS) - count(_N_ROUNDS)) / _N_ROUNDS
