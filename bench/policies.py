# SPDX-License-Identifier: Apache-2.0
"""``make bench-policies``: every policy on traces of real programs, side by side.

Each trace is recorded now, from the retpoline build of a program that the benchmarks
measure, and replayed through all policies (``optpoline simulate``). The bar is that the
default policy is the best on each trace, or within one percent of the best.

Recorded is all the time: a burst now and then would stand for the time until the next one,
and make long phases of the short ones that every interpreter has. A replay goes through the
trace several times over, because a session lasts longer than a recording: otherwise most of
what is compared would be the first learning window, which is the same for all.
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

from rich import box
from rich.table import Table

from bench.build import Variant
from bench.errors import BenchError
from bench.paths import OPTPOLINE, RESULTS
from bench.programs import cxx, libxml2, lua, redis, sqlite
from bench.results import JsonObject, write_group
from bench.tables import console
from bench.workload import Worker, Workload

__all__ = ["Recorded", "Recording", "Replay", "chosen_recordings", "main"]

_DEFAULT = "adaptive"
_STATIC = "(static)"
_REPEAT = 8
_BAR = 1.01
_TIMEOUT_S = 300.0
_GROUP = "policies"
_PLAIN_CXX = ", shuffled, 1 threads"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """What is recorded.

    Attributes:
        build: Builds the program.
        workload: What it is made to do.
        learn_s: Time in which its targets are learned, which has to meet all of them.
        seconds: Length of the recording, learning included; four times ``learn_s`` at least.
    """

    build: Callable[[Variant], Path]
    workload: Workload
    learn_s: float = 1.0
    seconds: float = 6.0

    @property
    def name(self) -> str:
        """How people know it."""
        group, name = self.workload.group, self.workload.name.removesuffix(_PLAIN_CXX)
        return name if group == "other" or name.startswith(group) else f"{group} {name}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recorded:
    """How much of a program a trace holds.

    Attributes:
        n_branches: Branches in it.
        n_missing: Branches that are not: overwritten before they were read, or to targets
            that learning did not meet.
    """

    n_branches: int
    n_missing: int

    @property
    def missing_ratio(self) -> float:
        """Share of all branches made meanwhile that are not in the trace."""
        return self.n_missing / max(1, self.n_branches + self.n_missing)


@dataclass(frozen=True, slots=True, kw_only=True)
class Replay:
    """A trace, replayed through every policy.

    Attributes:
        name: The workload.
        recorded: What was recorded of it.
        seconds: Length of the replay.
        n_changes: Changes of its hot sites meanwhile.
        cycles: Policy to cycles a branch.
        windows_hz: Policy to windows a second, which take the controller a millisecond each.
        static_cycles: Cycles a branch of one tree a site, the best for the whole run.
    """

    name: str
    recorded: Recorded
    seconds: float
    n_changes: int
    cycles: dict[str, float]
    windows_hz: dict[str, float]
    static_cycles: float

    @property
    def ratio(self) -> float:
        """Cycles of the default policy, of the best one's."""
        return self.cycles[_DEFAULT] / min(self.cycles.values())


def chosen_recordings() -> list[Recording]:
    """Return what is recorded: programs of different kind."""
    scripts = ("sort", "strings", "closures", "coroutines", "methods", "mixed")
    chosen = [
        Recording(build=lua.build_lua, workload=lua.lua_workload(script)) for script in scripts
    ]
    chosen += [
        Recording(build=sqlite.build_sqlite, workload=workload) for workload in sqlite.WORKLOADS
    ]
    chosen += [
        Recording(build=redis.build_redis, workload=redis.WORKLOADS[-1]),
        # Learns a round of all tests, and records three.
        Recording(build=redis.build_redis, workload=redis.IN_TURN, learn_s=4.5, seconds=18.0),
    ]
    chosen += [
        Recording(build=libxml2.build_libxml2, workload=workload) for workload in libxml2.WORKLOADS
    ]
    chosen += [
        Recording(build=cxx.build_cxx, workload=workload)
        for workload in cxx.WORKLOADS
        if workload.name.endswith(_PLAIN_CXX) and cxx.n_classes(workload.name) > 1
    ]
    return chosen


def _record(recording: Recording, trace: Path) -> Recorded:
    """Record a program at work."""
    workload = recording.workload
    executable = recording.build(Variant.RETPOLINE)
    with workload.start(executable, workload.name) as worker:
        said = _keep_busy(worker, _record_command(recording, trace, worker.pid), recording.name)
    document = cast(dict[str, int], json.loads(said))
    n_missing = document["n_dropped"] + document["n_unknown"]
    return Recorded(n_branches=document["n_branches"], n_missing=n_missing)


def _record_command(recording: Recording, trace: Path, pid: int) -> list[str]:
    """Return the command that records a process."""
    return [
        *(str(OPTPOLINE), "record", "--trace", str(trace), "-f", "-q", "--json", "-"),
        *("--every-ms", "0", "--learn-seconds", f"{recording.learn_s:g}"),
        *("--duration", f"{recording.seconds:g}", str(pid)),
    ]


def _keep_busy(worker: Worker, command: list[str], name: str) -> str:
    """Let a program work until a command has ended; return what that wrote.

    Raises:
        BenchError: if it failed.
    """
    recorder = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    said: list[tuple[str, str]] = []
    reader = threading.Thread(target=lambda: said.append(recorder.communicate()))
    reader.start()
    try:
        while reader.is_alive():
            worker.iterate()
    except BaseException:
        recorder.terminate()
        raise
    finally:
        reader.join()
    written, complaint = said[0]
    if recorder.returncode:
        raise BenchError(f"{name} could not be recorded: {complaint.strip()}")
    return written


def _replay(name: str, trace: Path, recorded: Recorded) -> Replay:
    """Replay a trace through all policies."""
    command = [str(OPTPOLINE), "simulate", str(trace), "--repeat", str(_REPEAT), "--json", "-"]
    done = subprocess.run(
        [*command, "-q"], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    if done.returncode:
        raise BenchError(f"{name} could not be replayed: {done.stderr.strip()}")
    document = cast(dict[str, object], json.loads(done.stdout))
    rows = cast(list[dict[str, object]], document["policies"])
    ideals = cast(list[dict[str, object]], document["ideals"])
    seconds = cast(float, document["seconds"])
    return Replay(
        name=name,
        recorded=recorded,
        seconds=seconds,
        n_changes=cast(int, document["n_changes"]),
        cycles={str(row["name"]): cast(float, row["cycles"]) for row in rows},
        windows_hz={str(row["name"]): cast(int, row["windows"]) / seconds for row in rows},
        static_cycles=next(cast(float, row["cycles"]) for row in ideals if row["name"] == _STATIC),
    )


def main() -> int:
    """Record, replay and compare; returns 1 if something could not be measured."""
    replays: list[Replay] = []
    status = 0
    with tempfile.TemporaryDirectory(prefix="traces-") as directory:
        trace = Path(directory) / "trace"
        for recording in chosen_recordings():
            console.print(f"{_GROUP}: {recording.name}")
            try:
                recorded = _record(recording, trace)
                replays.append(_replay(recording.name, trace, recorded))
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
    table = Table(
        title="cycles a branch, by the cost model",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    table.add_column("trace", no_wrap=True)
    for name in ("missing", "changes", *names, _STATIC, "of best"):
        table.add_column(name, justify="right", no_wrap=True)
    for replay in replays:
        table.add_row(
            replay.name,
            f"{replay.recorded.missing_ratio:.0%}",
            str(replay.n_changes),
            *(f"{replay.cycles[name]:.2f}" for name in names),
            f"{replay.static_cycles:.2f}",
            f"{replay.ratio:.4f}",
        )
    console.print(table)
    n_met = sum(replay.ratio <= _BAR for replay in replays)
    console.print(f"{_DEFAULT} within {_BAR - 1:.0%} of the best: {n_met} of {len(replays)} traces")
    means = {
        name: sum(replay.windows_hz[name] for replay in replays) / len(replays) for name in names
    }
    told = ", ".join(f"{name} {windows_hz:.1f}" for name, windows_hz in means.items())
    console.print(f"windows a second of all sites, mean of all traces: {told}")


def _document(replays: list[Replay]) -> JsonObject:
    """Return what is written to the results."""
    return {
        "bar": f"{_DEFAULT} within {_BAR - 1:.0%} of the best on each trace",
        "verdict": "met" if all(replay.ratio <= _BAR for replay in replays) else "MISSED",
        "traces": [
            {
                "name": replay.name,
                "branches": replay.recorded.n_branches,
                "missing": replay.recorded.n_missing,
                "seconds": replay.seconds,
                "changes": replay.n_changes,
                "cycles": dict(replay.cycles),
                "windows_hz": dict(replay.windows_hz),
                "static_cycles": replay.static_cycles,
            }
            for replay in replays
        ],
    }


if __name__ == "__main__":
    sys.exit(main())
