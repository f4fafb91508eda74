# SPDX-License-Identifier: Apache-2.0
"""SQLite calling back into the program: a collation, aggregates, a virtual table.

gcc turns a switch into a table of jumps, but not when it compiles with retpolines: then it
becomes a tree of compares. SQLite's run loop is such a switch. What that costs no run-time
promotion can give back, for no indirect branch is left; ``NO_TABLES`` is the plain build
without such tables, which tells the two costs apart.
"""

from __future__ import annotations

from pathlib import Path

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.commands import require_command, run_command
from bench.driver import Driver
from bench.paths import BENCH, BUILD
from bench.sources import SQLITE, fetch_source
from bench.workload import Workload

__all__ = ["WORKLOADS", "build_sqlite"]

_DRIVER = BENCH / "sqlite" / "driver.c"
_DEFINES = ("-DSQLITE_OMIT_LOAD_EXTENSION", "-DSQLITE_THREADSAFE=0")


def _workload(kind: str) -> Workload:
    """Return the workload of one argument of the driver."""

    def start(executable: Path, name: str) -> Driver:
        return Driver(name, [str(executable), kind])

    return Workload(group="sqlite", name=f"sqlite {kind}", start=start)


WORKLOADS = tuple(_workload(kind) for kind in ("collation", "aggregate", "vtable"))


def build_sqlite(variant: Variant) -> Path:
    """Build SQLite and our driver into one executable; returns it."""
    amalgamation = _amalgamation()
    flags = (*variant_flags(variant), *_DEFINES)

    def build(directory: Path) -> Path:
        return compile_program(
            [amalgamation, _DRIVER],
            output=directory / "sqlite-driver",
            flags=(*flags, f"-I{amalgamation.parent}"),
            libraries=("-lm",),
        )

    return build_once("sqlite", variant, [amalgamation, _DRIVER, *flags], build)


def _amalgamation() -> Path:
    """Make SQLite's one big source file, as its own build does; needs Tcl."""
    directory = BUILD / "programs" / "sqlite" / "amalgamation"
    made = directory / "sqlite3.c"
    if not made.exists():
        root = fetch_source(SQLITE)
        require_command("tclsh", package="tcl")
        directory.mkdir(parents=True, exist_ok=True)
        run_command([str(root / "configure"), "--disable-tcl"], cwd=directory)
        run_command(["make", "sqlite3.c"], cwd=directory)
    return made
