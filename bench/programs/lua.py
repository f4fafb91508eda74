# SPDX-License-Identifier: Apache-2.0
"""The Lua 5.4 interpreter: one indirect jump of its run loop is nearly all of its cost.

The peer is what a user of gcc has today: the retpoline build again, with the profile of
the very scripts that are measured (``-fprofile-use``), which is the best case for it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.commands import run_command
from bench.driver import Driver
from bench.paths import BENCH
from bench.sources import LUA, fetch_source
from bench.workload import Workload

__all__ = ["SCRIPTS", "build_lua", "lua_workload"]

SCRIPTS = (
    "recursion",
    "sort",
    "strings",
    "closures",
    "coroutines",
    "tables",
    "methods",
    "mixed",
)

_DEFINES = ("-DLUA_COMPAT_5_3", "-DLUA_USE_LINUX")
_LIBRARIES = ("-Wl,-E", "-lm", "-ldl")
_NOT_OURS = ("luac.c", "ltests.c", "onelua.c")
_DIRECTORY = BENCH / "lua"
_TRAINING_ITERATIONS = 2


def lua_workload(script: str) -> Workload:
    """Return the workload of one script."""

    def start(executable: Path, name: str) -> Driver:
        return Driver(name, _command(executable, script))

    return Workload(group="lua", name=script, start=start)


def build_lua(variant: Variant) -> Path:
    """Build the interpreter; returns its executable."""
    root = next(fetch_source(LUA).rglob(LUA.probe)).parent
    sources = sorted(path for path in root.glob("*.c") if path.name not in _NOT_OURS)
    flags = (*variant_flags(variant), *_DEFINES)
    inputs: list[Path | str] = [*sources, *flags, *_LIBRARIES]
    if variant is Variant.PGO:
        inputs += sorted(_DIRECTORY.glob("*.lua"))

    def build(directory: Path) -> Path:
        output = directory / "lua"
        if variant is Variant.PGO:
            _compile(sources, output, (*flags, "-fprofile-generate"))
            for script in SCRIPTS:
                _train(_command(output, script))
            output.unlink()
            return _compile(sources, output, (*flags, "-fprofile-use"))
        return _compile(sources, output, flags)

    return build_once("lua", variant, inputs, build)


def _command(executable: Path, script: str) -> list[str]:
    """Return the command that runs a script as a driver."""
    return [str(executable), str(_DIRECTORY / "driver.lua"), str(_DIRECTORY), script]


def _compile(sources: Sequence[Path], output: Path, flags: Sequence[str]) -> Path:
    """Compile and link the interpreter."""
    return compile_program(sources, output=output, flags=flags, libraries=_LIBRARIES)


def _train(command: Sequence[str]) -> None:
    """Run a script in the instrumented build, which writes its profile when it ends."""
    lines = "\\n" * _TRAINING_ITERATIONS
    run_command(["sh", "-c", f'printf "{lines}" | "$@"', "sh", *command])
