# SPDX-License-Identifier: Apache-2.0
"""``make demo``: a real program three ways, side by side.

Builds the Lua interpreter from its published source, plain and with retpolines; runs the
same scripts in both; attaches optpoline to a third, running the retpoline build, and
measures that as well. Takes about a minute once the interpreters are built.
"""

from __future__ import annotations

import os
import sys
import time

from bench.build import Variant
from bench.errors import BenchError
from bench.programs.lua import build_lua, lua_workload
from bench.tables import console, print_measured
from bench.verdicts import group_mean
from bench.workload import measure_workload

__all__ = ["main"]

_SCRIPTS = ("recursion", "sort", "methods", "mixed")
_ROUNDS = 3


def main() -> int:
    """Run the demo; returns the exit status."""
    console.print(
        "optpoline demo: the Lua 5.4 interpreter, compiled from its published source with "
        "gcc -O2,\nonce plain and once with retpolines (-mindirect-branch=thunk)."
    )
    try:
        builds = {}
        for variant in (Variant.PLAIN, Variant.RETPOLINE):
            begin = time.monotonic()
            builds[variant] = build_lua(variant)
            took = time.monotonic() - begin
            console.print(f"  {variant.value}: {os.path.relpath(builds[variant])} ({took:.1f} s)")
        console.print(
            "Each script runs in three processes, asked in turn: plain, retpoline, and retpoline "
            "with\noptpoline attached while it runs. CPU time per iteration, medians of "
            f"{_ROUNDS} rounds with fresh processes.\n"
        )
        rows = []
        for script in _SCRIPTS:
            console.print(f"  measuring {script} ...")
            rows.append(measure_workload(lua_workload(script), builds, rounds=_ROUNDS))
    except BenchError as error:
        sys.stderr.write(f"demo: {error}\n")
        return 1
    console.print()
    print_measured("Lua 5.4", rows, mean=group_mean(rows), with_bars=False)
    console.print("recovered = (retpoline - promoted) / (retpoline - plain), 95 % intervals.")
    longest = max(row.summary.stop_ms_max for row in rows if row.summary)
    sites = max(row.summary.promoted for row in rows if row.summary)
    console.print(
        f"Up to {sites} sites promoted; the program was never stopped for longer than "
        f"{longest:.2f} ms at a time.\nAt the end each was given back as it was: every script "
        "printed the same results throughout."
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
