# SPDX-License-Identifier: Apache-2.0
"""Ninja, a build system in C++: virtual calls, callbacks, and its own tests in the package."""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from bench.build import Variant, build_once, variant_flags
from bench.commands import require_command, run_command
from bench.errors import BenchError
from bench.sources import NINJA, fetch_source

__all__ = ["build_ninja", "failed_tests", "plan_a_build"]

_EDGES = 3000
_GOALS = ("ninja", "ninja_test")


def build_ninja(variant: Variant) -> Path:
    """Build it and its tests with its own build files; returns its executable."""
    root = fetch_source(NINJA)
    ninja = require_command("ninja", package="ninja-build")
    flags = variant_flags(variant)

    def build(directory: Path) -> Path:
        tree = directory / "tree"
        shutil.copytree(root, tree, symlinks=True)
        environment = {**os.environ, "CXX": "g++", "CFLAGS": " ".join(flags)}
        run_command([sys.executable, "configure.py"], cwd=tree, env=environment)
        run_command([ninja, "-j2", *_GOALS], cwd=tree)
        for name in _GOALS:
            shutil.copy2(tree / name, directory / name)
        shutil.rmtree(tree)
        return directory / _GOALS[0]

    return build_once("ninja", variant, [*flags], build)


def plan_a_build(executable: Path, in_front: Sequence[str]) -> str:
    """Have it read a large build file and say what it would do; returns what it said.

    Args:
        executable: Ninja.
        in_front: Words in front of the command.
    """
    with tempfile.TemporaryDirectory(prefix="ninja-") as name:
        (Path(name) / "build.ninja").write_text(_build_file())
        command = [*in_front, str(executable), "-n", "-v", "-j1", "-d", "explain"]
        return run_command(command, cwd=Path(name))


def failed_tests(executable: Path) -> tuple[int, int]:
    """Run its own tests; returns how many checks failed, and how many tests there are."""
    with tempfile.TemporaryDirectory(prefix="ninja-") as name:
        # The exit status tells only whether all passed.
        command = ["sh", "-c", '"$1" || true', "sh", str(executable.with_name("ninja_test"))]
        environment = {**os.environ, "TMPDIR": name, "TERM": "dumb"}
        said = run_command(command, cwd=Path(name), env=environment, timeout_s=300)
    counts = re.findall(r"\[\d+/(\d+)\]", said)
    last = said.strip().splitlines()[-1] if said.strip() else ""
    failed = len(re.findall(r"\*\*\* Failure in ", said))
    if not counts or last != ("failed" if failed else "passed"):
        raise BenchError(f"the tests of Ninja ended with {last!r}")
    return failed, int(counts[-1])


def _build_file() -> str:
    """Make a build file with variables, rules, phony targets and all kinds of inputs."""
    lines = [
        "cflags = -O2 -Wall",
        "rule cc",
        "  command = cc $cflags $extra -MD -MF $out.d -c $in -o $out",
        "  description = CC $out",
        "  depfile = $out.d",
        "rule link",
        "  command = cc @$out.rsp -o $out",
        "  rspfile = $out.rsp",
        "  rspfile_content = $in",
        "pool heavy",
        "  depth = 2",
        "build source.h | generated.h: phony",
    ]
    for number in range(_EDGES):
        lines.append(f"build obj/{number}.o: cc src/{number}.c | source.h || order")
        if number % 7 == 0:
            lines.append(f"  extra = -DNUMBER={number}")
    for number in range(0, _EDGES, 50):
        inputs = " ".join(f"obj/{one}.o" for one in range(number, number + 50))
        lines += [f"build bin/{number}: link {inputs}", "  pool = heavy"]
    sources = " ".join(f"src/{number}.c" for number in range(_EDGES))
    lines.append(f"build {sources} order: phony")
    return "\n".join(lines) + "\n"
