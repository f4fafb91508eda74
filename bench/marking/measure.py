# SPDX-License-Identifier: Apache-2.0
"""What building with the plugin must not break, and what it costs; each part on its own.

``known``: each indirect branch that the program's own code executes, counted by callgrind,
is at the address of a note. Where retpolines are made there are no switch tables, so it must
be each one; without them, the build is one in which the compiler tells switch jumps apart.

``instructions``: with the plugin against without it, no controller near, the rest of the
flags the same; the median of several counts where they vary.
"""

from __future__ import annotations

import functools
import statistics
from collections.abc import Iterator

from bench.build import Variant
from bench.callgrind import Executed, count_executed
from bench.errors import BenchError
from bench.figures import Figure
from bench.marking.branches import find_executed_branches, read_noted
from bench.marking.programs import Program
from bench.marking.sizes import read_sizes
from bench.programs.lua import SCRIPTS, build_lua, lua_workload
from bench.statistics import recovered_mean
from bench.tables import console
from bench.workload import PROMOTED, measure_workload

__all__ = [
    "measure_builds",
    "measure_instructions",
    "measure_known",
    "measure_lua_recovered",
    "measure_marking",
    "measure_sizes",
    "measure_tests",
]

_PAIRS = ((Variant.PLAIN, Variant.PLUGIN), (Variant.RETPOLINE, Variant.PLUGIN_RETPOLINE))
_MARKED = tuple(marked for _, marked in _PAIRS)
_TOLD_APART = (Variant.PLUGIN_TRACKED, Variant.PLUGIN_RETPOLINE)
_KNOWN_BAR = 1.0
_INSTRUCTIONS_BAR = 0.01
_RECOVERED_BAR = 0.97
_ROUNDS = 7
_SHOWN = 10


def measure_marking(program: Program) -> Iterator[Figure]:
    """Measure all of a program but time."""
    yield from measure_builds(program)
    yield from measure_tests(program)
    yield from measure_known(program)
    yield from measure_instructions(program)
    yield from measure_sizes(program)


def measure_builds(program: Program) -> Iterator[Figure]:
    """Build a program with the plugin; compare the results of its work with the plain build's."""
    expected = program.work(program.build(Variant.PLAIN), ())
    built = same = 0
    for variant in _MARKED:
        try:
            path = program.build(variant)
            built += 1
            same += program.work(path, ()) == expected
        except BenchError as error:
            console.print(f"{program.name}, {variant.value}: {error}")
    for name, count in (("builds", built), ("computes what the plain build does", same)):
        yield Figure(
            name=f"{program.name}: {name}, of {len(_MARKED)} forms of the plugin",
            value=float(count),
            unit="forms",
            bar=float(len(_MARKED)),
            is_least=True,
        )


def measure_tests(program: Program) -> Iterator[Figure]:
    """Run a program's own tests, where its source package has any, in builds with the plugin."""
    if program.failed_tests is None:
        console.print(f"{program.name}: its source package has no tests of its own")
        return
    for variant in _MARKED:
        failed, n_tests = program.failed_tests(program.build(variant))
        yield Figure(
            name=f"{program.name}, {variant.value}: its own tests that fail, of {n_tests}",
            value=float(failed),
            unit="tests",
            bar=0.0,
        )


def measure_known(program: Program) -> Iterator[Figure]:
    """Compare the indirect branches that a program executes with its notes."""
    for variant in _TOLD_APART:
        path = program.build(variant)
        branches = find_executed_branches(path, _counted(program, variant)[0])
        noted = read_noted(path)
        calls = [one for one in branches if not one.is_switch]
        unknown = [one for one in calls if one.addr not in noted]
        for one in unknown[:_SHOWN]:
            console.print(f"{path.name}: no note at {one.addr:#x} in {one.function}")
        executed = sum(one.count for one in calls)
        if not executed:
            raise BenchError(f"{path} executed no indirect branch")
        what = f"{program.name}, {variant.value}: "
        yield Figure(
            name=f"{what}executed indirect branches at the address of a note, of {executed:,}"
            f" at {len(calls)} places",
            value=1.0 - sum(one.count for one in unknown) / executed,
            unit="of them",
            bar=_KNOWN_BAR,
            is_least=True,
        )
        yield Figure(name=f"{what}notes of branches", value=len(noted), unit="notes", bar=None)
        switches = sum(one.is_switch for one in branches)
        if switches:
            yield Figure(
                name=f"{what}places with jumps through switch tables, which have no notes",
                value=float(switches),
                unit="places",
                bar=None,
            )


def measure_instructions(program: Program) -> Iterator[Figure]:
    """Count the instructions of a program's work with the plugin, against without it."""
    for without, marked in _PAIRS:
        before, after = (
            [sum(executed.values()) for executed in _counted(program, variant)]
            for variant in (without, marked)
        )
        middle = statistics.median(before)
        yield Figure(
            name=f"{program.name}, {marked.value}: instructions executed, more than"
            f" {middle:,.0f} of {without.value}",
            value=statistics.median(after) / middle - 1.0,
            unit="more",
            bar=_INSTRUCTIONS_BAR,
        )
        if len(before) > 1:
            yield Figure(
                name=f"{program.name}, {without.value}: by how much these counts vary",
                value=max(before) / min(before) - 1.0,
                unit="more",
                bar=None,
            )


def measure_sizes(program: Program) -> Iterator[Figure]:
    """Compare the sizes of a program with the plugin and without it."""
    for without, marked in _PAIRS:
        before = read_sizes(program.build(without))
        after = read_sizes(program.build(marked))
        what = f"{program.name}, {marked.value}: "
        for name, value, unit in (
            ("code", before.text, "bytes without"),
            ("code", after.text / before.text - 1.0, "more"),
            ("notes", after.notes, "bytes"),
            (
                "all that is loaded and not written",
                after.read_only / before.read_only - 1.0,
                "more",
            ),
        ):
            yield Figure(name=what + name, value=float(value), unit=unit, bar=None)


def measure_lua_recovered(
    scripts: tuple[str, ...] = SCRIPTS, *, rounds: int = _ROUNDS
) -> Iterator[Figure]:
    """Promote Lua built with retpolines and the plugin, and see how much time comes back.

    Args:
        scripts: What it is made to do.
        rounds: Fresh processes of each variant.
    """
    builds = {
        Variant.PLAIN: build_lua(Variant.PLAIN),
        Variant.RETPOLINE: build_lua(Variant.PLUGIN_RETPOLINE),
    }
    rows = [measure_workload(lua_workload(name), builds, rounds=rounds) for name in scripts]
    for row in rows:
        estimate = row.recovered
        yield Figure(
            name=f"lua, {Variant.PLUGIN_RETPOLINE.value}: recovered by promotion, {row.name}"
            f" ({estimate.low:.3f} to {estimate.high:.3f})",
            value=estimate.value,
            unit="of the cost",
            bar=None,
        )
    triples = [
        (row.of(Variant.PLAIN), row.of(Variant.RETPOLINE), row.samples[PROMOTED]) for row in rows
    ]
    mean = recovered_mean(triples)
    yield Figure(
        name=f"lua, {Variant.PLUGIN_RETPOLINE.value}: recovered by promotion, geometric mean of"
        f" {len(rows)} scripts ({mean.low:.3f} to {mean.high:.3f})",
        value=mean.value,
        unit="of the cost",
        bar=_RECOVERED_BAR,
        is_least=True,
    )


@functools.cache
def _counted(program: Program, variant: Variant) -> tuple[Executed, ...]:
    """Count what a program's work executes, as often as it takes."""
    path = program.build(variant)
    compared = any(variant in pair for pair in _PAIRS)
    counted = [
        count_executed(path, lambda in_front: program.work(path, in_front))
        for _ in range(program.n_counts if compared else 1)
    ]
    expected = program.work(program.build(Variant.PLAIN), ())
    for _, result in counted:
        if result != expected:
            raise BenchError(f"{path} computed {result[:80]!r} and not {expected[:80]!r}")
    return tuple(executed for executed, _ in counted)
