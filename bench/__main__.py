# SPDX-License-Identifier: Apache-2.0
"""``make bench``: measure every workload, print tables, write build/bench.json."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.adapting import (
    measure_alternation,
    measure_flips,
    measure_learning,
    measure_phases,
    measure_watching,
)
from bench.build import Variant
from bench.changing import measure_changes
from bench.declared.instructions import measure_declared_instructions
from bench.declared.times import measure_declared_times
from bench.errors import BenchError
from bench.figures import Figure, measure_quiet, measure_sites
from bench.many_sites import measure_many_sites
from bench.marking.dynamic_call import measure_dynamic_call
from bench.marking.measure import measure_lua_recovered, measure_marking
from bench.marking.programs import PROGRAMS
from bench.options import names_of
from bench.paths import RESULTS, ROOT
from bench.programs import cxx, libxml2, lua, redis, sqlite
from bench.programs.phases import build_phases
from bench.results import figures_document, group_document, write_group
from bench.tables import console, print_figures, print_measured
from bench.verdicts import group_mean, peer_mean
from bench.workload import Measured, Workload, measure_workload

__all__ = ["main"]

_ROUNDS = 7
_FEWEST_ROUNDS = 5
_FIGURES = "figures"
_ADAPTING = "adapting"
_PLUGIN = "plugin"
_DECLARED = "declared"
_SITES = (50, 2000)


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Workloads of one program.

    Attributes:
        build: Builds a variant of the program.
        variants: What is built.
        workloads: What it is made to do.
    """

    build: Callable[[Variant], Path]
    variants: tuple[Variant, ...]
    workloads: tuple[Workload, ...]


_BOTH = (Variant.PLAIN, Variant.RETPOLINE)
_GROUPS = {
    "lua": Group(
        build=lua.build_lua,
        variants=(*_BOTH, Variant.PGO, Variant.NO_TABLES),
        workloads=tuple(lua.lua_workload(script) for script in lua.SCRIPTS),
    ),
    "sqlite": Group(
        build=sqlite.build_sqlite,
        variants=(*_BOTH, Variant.NO_TABLES),
        workloads=sqlite.WORKLOADS,
    ),
    "redis": Group(build=redis.build_redis, variants=_BOTH, workloads=redis.WORKLOADS),
    "cxx": Group(build=cxx.build_cxx, variants=_BOTH, workloads=cxx.WORKLOADS),
    "other": Group(
        build=libxml2.build_libxml2,
        variants=(*_BOTH, Variant.NO_TABLES),
        workloads=libxml2.WORKLOADS,
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmarks; returns the exit status: 1 if something could not be measured."""
    options = _parse(arguments)
    chosen: list[str] = options.only or [*_GROUPS, _FIGURES, _ADAPTING, _PLUGIN, _DECLARED]
    status = 0
    for name in chosen:
        begin = time.monotonic()
        try:
            if name == _FIGURES:
                _run_figures()
            elif name == _ADAPTING:
                _run_adapting()
            elif name == _PLUGIN:
                _run_plugin(rounds=options.rounds)
            elif name == _DECLARED:
                _run_declared(rounds=options.rounds)
            else:
                _run_group(name, rounds=options.rounds, promote=not options.no_promote)
        except BenchError as error:
            sys.stderr.write(f"bench: {name}: {error}\n")
            status = 1
        console.print(f"{name}: {time.monotonic() - begin:.0f} s\n")
    console.print(f"all results: {RESULTS.relative_to(ROOT)}")
    return status


def _run_group(name: str, *, rounds: int, promote: bool) -> None:
    """Build a program, measure its workloads, print and write the results."""
    group = _GROUPS[name]
    builds = {}
    for variant in group.variants:
        console.print(f"{name}: building {variant.value}")
        builds[variant] = group.build(variant)
    rows: list[Measured] = []
    for workload in group.workloads:
        console.print(f"{name}: measuring {workload.name}")
        rows.append(measure_workload(workload, builds, rounds=rounds, promote=promote))
        if promote:
            write_group(RESULTS, name, group_document(name, rows))
    print_measured(name, rows, mean=group_mean(rows), peer=peer_mean(rows))


def _run_figures() -> None:
    """Measure what attaching costs; print and write the results."""
    figures: list[Figure] = []
    for n_sites in _SITES:
        console.print(f"{_FIGURES}: {n_sites} sites")
        figures += measure_sites(n_sites)
    console.print(f"{_FIGURES}: thousands of sites that run")
    figures += measure_many_sites()
    console.print(f"{_FIGURES}: the settled controller")
    figures += measure_quiet(lua.lua_workload("mixed"), lua.build_lua(Variant.RETPOLINE))
    write_group(RESULTS, _FIGURES, figures_document(figures))
    print_figures(_FIGURES, figures)


def _run_adapting() -> None:
    """Measure how promotions follow a program that changes; print and write the results."""
    console.print(f"{_ADAPTING}: building")
    executable = build_phases()
    figures: list[Figure] = []
    for measure in (
        measure_flips,
        measure_phases,
        measure_alternation,
        measure_watching,
        measure_learning,
        measure_changes,
    ):
        console.print(f"{_ADAPTING}: {measure.__name__.removeprefix('measure_')}")
        figures += measure(executable)
        write_group(RESULTS, _ADAPTING, figures_document(figures))
    print_figures(_ADAPTING, figures)


def _run_plugin(*, rounds: int) -> None:
    """Measure programs built with the compiler plugin; print and write the results."""
    figures: list[Figure] = []
    for program in PROGRAMS:
        console.print(f"{_PLUGIN}: {program.name}")
        figures += measure_marking(program)
        write_group(RESULTS, _PLUGIN, figures_document(figures))
    console.print(f"{_PLUGIN}: dynamic calls")
    figures += measure_dynamic_call()
    console.print(f"{_PLUGIN}: promoting Lua")
    figures += measure_lua_recovered(rounds=rounds)
    write_group(RESULTS, _PLUGIN, figures_document(figures))
    print_figures(_PLUGIN, figures)


def _run_declared(*, rounds: int) -> None:
    """Measure what declared calls and branches cost; print and write the results."""
    console.print(f"{_DECLARED}: instructions")
    figures = [*measure_declared_instructions()]
    console.print(f"{_DECLARED}: times")
    figures += measure_declared_times(rounds=rounds)
    write_group(RESULTS, _DECLARED, figures_document(figures))
    print_figures(_DECLARED, figures)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="bench", description="Measure the workloads.")
    names = [*_GROUPS, _FIGURES, _ADAPTING, _PLUGIN, _DECLARED]
    parser.add_argument(
        "--only",
        type=names_of(names, "group"),
        metavar="GROUP,...",
        help=f"only these groups, of {', '.join(names)}",
    )
    parser.add_argument(
        "--rounds",
        type=_rounds,
        default=_ROUNDS,
        metavar="N",
        help=f"rounds per workload, at least {_FEWEST_ROUNDS} (default {_ROUNDS})",
    )
    parser.add_argument(
        "--no-promote", action="store_true", help="compare the builds only; writes no results"
    )
    return parser.parse_args(arguments)


def _rounds(text: str) -> int:
    """Read a number of rounds; fewer than five have no interval worth the name."""
    if not text.isdecimal() or int(text) < _FEWEST_ROUNDS:
        raise argparse.ArgumentTypeError(f"at least {_FEWEST_ROUNDS} rounds are needed")
    return int(text)


if __name__ == "__main__":
    sys.exit(main())
