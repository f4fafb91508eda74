# SPDX-License-Identifier: Apache-2.0
"""The programs that are built with the plugin, and the fixed work that each is given.

Sources are as published: nothing is patched, and flags are all that differs. The work is the
same each time, so that its results and its instructions can be compared between builds.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.build import Variant
from bench.commands import run_command
from bench.errors import BenchError
from bench.paths import BENCH, BUILD
from bench.programs import ninja, redis, redis_session
from bench.programs.cxx import build_cxx
from bench.programs.lua import SCRIPTS, build_lua

__all__ = ["PROGRAMS", "Program"]

_LUA_TESTS = BUILD / "src" / "lua-tests"
"""Where Lua's own tests may be put: its source package has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A program that is built several ways.

    Attributes:
        name: Its name.
        build: Builds a variant; returns the executable.
        work: Has an executable do its fixed work, with words in front of its command;
            returns what it computed.
        failed_tests: Runs its own tests; returns how many failed, and how many there are.
            None where its source package has none.
        n_counts: How often its instructions are counted: more than once where they vary.
    """

    name: str
    build: Callable[[Variant], Path]
    work: Callable[[Path, Sequence[str]], str]
    failed_tests: Callable[[Path], tuple[int, int]] | None
    n_counts: int = 1


def _run_lua_scripts(executable: Path, in_front: Sequence[str]) -> str:
    """Run each script once, in one interpreter."""
    names = ", ".join(f'"{name}"' for name in SCRIPTS)
    code = f'for _, name in ipairs{{{names}}} do print(dofile(name .. ".lua")()) end'
    return run_command([*in_front, str(executable), "-e", code], cwd=BENCH / "lua")


def _failed_lua_tests(executable: Path) -> tuple[int, int]:
    """Run Lua's own tests, which end at the first failure; they count as one."""
    said = run_command(
        ["sh", "-c", '"$1" -e "_U=true" all.lua || true', "sh", str(executable)],
        cwd=_LUA_TESTS,
        timeout_s=300,
    )
    return (0 if "final OK !!!" in said else 1), 1


def _run_virtual_calls(executable: Path, in_front: Sequence[str]) -> str:
    """Have four classes called in random order by two threads."""
    command = [*in_front, str(executable), "4", "shuffled", "2"]
    # It answers one line of input with its processor time and its result.
    return run_command(["sh", "-c", 'echo | "$@"', "sh", *command]).split()[-1]


def _plan_a_build(executable: Path, in_front: Sequence[str]) -> str:
    """Have Ninja plan a build; returns a digest of its plan."""
    said = ninja.plan_a_build(executable, in_front)
    if len(said.splitlines()) < 1000:
        raise BenchError(f"Ninja said only {said[:200]!r}")
    return hashlib.sha256(said.encode()).hexdigest()[:16]


PROGRAMS = (
    Program(
        name="lua",
        build=build_lua,
        work=_run_lua_scripts,
        failed_tests=_failed_lua_tests if _LUA_TESTS.is_dir() else None,
        n_counts=3,
    ),
    Program(
        name="redis",
        build=redis.build_redis,
        work=redis_session.answer_commands,
        failed_tests=redis_session.failed_tests,
        n_counts=3,
    ),
    Program(name="cxx", build=build_cxx, work=_run_virtual_calls, failed_tests=None),
    Program(
        name="ninja",
        build=ninja.build_ninja,
        work=_plan_a_build,
        failed_tests=ninja.failed_tests,
    ),
)
