# SPDX-License-Identifier: Apache-2.0
"""``make bench-policies``: every policy on traces of real programs, side by side.

Each trace is recorded now, from the retpoline build of a program that the benchmarks
measure, and replayed through all policies (``optpoline simulate``). The bar is that the
default policy is the best on each trace, or within one percent of the best.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from rich.table import Table

from bench.build import Variant
from bench.errors import BenchError
from bench.paths import OPTPOLINE, RESULTS
from bench.programs import cxx, lua, redis, sqlite
from bench.results import JsonValue, write_group
from bench.tables import console
from bench.workload import Workload

__all__ = ["main"]

_DEFAULT = "adaptive"
_SECONDS = 8.0
_BAR = 1.01
_TIMEOUT_S = 300.0
_GROUP = "policies"


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace, replayed through every policy.

    Attributes:
        name: The workload.
        branches: Branches in the trace.
        cycles: Policy to cycles a branch.
    """

    name: str
    branches: int
    cycles: dict[str, float]

    @property
    def ratio(self) -> float:
        """Cycles of the default policy, of the best one's."""
        return self.cycles[_DEFAULT] / min(self.cycles.values())


def _chosen() -> list[tuple[Callable[[Variant], Path], Workload]]:
    """Return what is recorded: programs of different kind."""
    scripts = ("sort", "strings", "closures", "coroutines", "methods", "mixed")
    chosen: list[tuple[Callable[[Variant], Path], Workload]] = [
        (lua.build_lua, lua.lua_workload(script)) for script in scripts
    ]
    chosen += [(sqlite.build_sqlite, workload) for workload in sqlite.WORKLOADS]
    chosen += [(redis.build_redis, redis.WORKLOADS[-1])]
    chosen += [
        (cxx.build_cxx, workload) for workload in cxx.WORKLOADS if "shuffled, 1" in workload.name
    ]
    return chosen


def _record(executable: Path, workload: Workload, trace: Path) -> None:
    """Record a program at work."""
    with workload.start(executable, workload.name) as worker:
        command = [str(OPTPOLINE), "record", "--trace", str(trace), "-f", "-q"]
        recorder = subprocess.Popen(
            [*command, "--duration", f"{_SECONDS:g}", str(worker.pid)],
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        said: list[str] = []
        reader = threading.Thread(target=lambda: said.append(recorder.communicate()[1]))
        reader.start()
        while reader.is_alive():
            worker.iterate()
        reader.join()
    if recorder.returncode:
        raise BenchError(f"{workload.name} could not be recorded: {said[0].strip()}")


def _replay(name: str, trace: Path) -> Replay:
    """Replay a trace through all policies."""
    command = [str(OPTPOLINE), "simulate", str(trace), "--json", "-", "-q"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False)
    if done.returncode:
        raise BenchError(f"{name} could not be replayed: {done.stderr.strip()}")
    document = cast(dict[str, object], json.loads(done.stdout))
    rows = cast(list[dict[str, object]], document["policies"])
    return Replay(
        name=name,
        branches=int(cast(int, document["n_branches"])),
        cycles={str(row["name"]): float(cast(float, row["cycles"])) for row in rows},
    )


def main() -> int:
    """Record, replay and compare; returns 1 if something could not be measured."""
    replays: list[Replay] = []
    status = 0
    with tempfile.TemporaryDirectory(prefix="traces-") as directory:
        trace = Path(directory) / "trace"
        for build, workload in _chosen():
            console.print(f"{_GROUP}: {workload.name}")
            try:
                _record(build(Variant.RETPOLINE), workload, trace)
                replays.append(_replay(f"{workload.group} {workload.name}", trace))
            except BenchError as error:
                sys.stderr.write(f"bench: {error}\n")
                status = 1
    if replays:
        _print(replays)
        write_group(RESULTS, _GROUP, _document(replays))
    return status


def _print(replays: list[Replay]) -> None:
    """Print cycles a branch of each policy on each trace."""
    names = sorted(replays[0].cycles, key=lambda name: (name != _DEFAULT, name))
    table = Table(title="cycles a branch, by the cost model", title_justify="left")
    table.add_column("trace")
    for name in (*names, f"{_DEFAULT} of best"):
        table.add_column(name, justify="right")
    table.add_column("")
    for replay in replays:
        cycles = [f"{replay.cycles[name]:.3f}" for name in names]
        verdict = "met" if replay.ratio <= _BAR else "MISSED"
        table.add_row(replay.name, *cycles, f"{replay.ratio:.4f}", verdict)
    console.print(table)


def _document(replays: list[Replay]) -> dict[str, JsonValue]:
    """Return what is written to the results."""
    return {
        "bar": f"{_DEFAULT} within {_BAR - 1:.0%} of the best on each trace",
        "verdict": "met" if all(replay.ratio <= _BAR for replay in replays) else "MISSED",
        "traces": [
            {"name": replay.name, "branches": replay.branches, "cycles": dict(replay.cycles)}
            for replay in replays
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
