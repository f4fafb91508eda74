# SPDX-License-Identifier: Apache-2.0
"""A dynamic call that nobody watches, against the plain call that it replaces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.callgrind import count_executed
from bench.commands import run_command
from bench.errors import BenchError
from bench.figures import Figure
from bench.paths import BENCH

__all__ = ["measure_dynamic_call"]

_SOURCE = BENCH / "marking" / "dynamic_call.c"
_N_CALLS = 20_000
_LEVELS = ("-O1", "-O2", "-O3", "-Os")
_BUILDS = (Variant.PLAIN, Variant.RETPOLINE, Variant.PLUGIN)
_CXX = "g++"


def measure_dynamic_call() -> Iterator[Figure]:
    """Count the instructions of one program whose calls are declared, and are not."""
    for variant in _BUILDS:
        for level in _LEVELS:
            yield _compare(variant, level, "gcc")
        yield _compare(variant, "-O2", _CXX)
        yield _compare(variant, "-O2", "gcc", is_unordered=True)


def _compare(variant: Variant, level: str, compiler: str, *, is_unordered: bool = False) -> Figure:
    """Compare the two with one set of flags.

    Where the language leaves open when a pointer is read, the plain call reads it earlier;
    what that saves or costs is reported, and no bar asks the two to be the same.
    """
    arguments = (str(_N_CALLS), *(("nested",) if is_unordered else ()))
    plain, computed = _count(_build(variant, level, compiler, "called"), arguments)
    declared, also = _count(_build(variant, level, compiler, "declared"), arguments)
    if computed != also:
        raise BenchError(f"the dynamic calls computed {also}, and plain ones {computed}")
    what = "instructions that nested calls of members have more" if is_unordered else "difference"
    return Figure(
        name=f"dynamic_call, {compiler} {level}, {variant.value}: {what}, of {plain:,}",
        value=float(declared - plain if is_unordered else abs(declared - plain)),
        unit="instructions",
        bar=None if is_unordered else 0.0,
    )


def _count(path: Path, arguments: Sequence[str]) -> tuple[int, str]:
    """Have a build make its calls; return its instructions, and what it computed."""

    def run(in_front: Sequence[str]) -> str:
        return run_command([*in_front, str(path), *arguments])

    executed, computed = count_executed(path, run)
    return sum(executed.values()), computed


def _build(variant: Variant, level: str, compiler: str, name: str) -> Path:
    """Build the program with its calls declared, or not; g++ takes it for C++."""
    # The flags of this form tell where optpoline.h is.
    include = [flag for flag in variant_flags(Variant.PLUGIN) if flag.startswith("-I")]
    flags = (*variant_flags(variant), level, *include)
    flags += ("-DDECLARED",) if name == "declared" else ()

    def build(directory: Path) -> Path:
        return compile_program([_SOURCE], output=directory / name, flags=flags, compiler=compiler)

    program = f"dynamic-call-{name}-{compiler}{level}"
    return build_once(program, variant, [_SOURCE, *flags, compiler], build)
