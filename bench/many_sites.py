# SPDX-License-Identifier: Apache-2.0
"""A program of 20,000 sites, all of which run, some often: how fast, at what cost.

Seen from outside: what optpoline writes, by the clock on the wall, its memory, and its
arena's. Only the length of the stops is what it tells itself.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from pathlib import Path

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.controller import ATTACHED_LINE, Controller, Summary
from bench.driver import Driver
from bench.errors import BenchError
from bench.figures import Figure
from bench.gen_sites import busy_functions, generate_busy_sites

__all__ = ["measure_many_sites"]

_N_SITES = 20_000
_N_HOT = 4_000
_FIRST_BAR_S = 2.0
_MEMORY_BAR_MB = 300.0
_STOP_BAR_MS = 10.0
_NEARLY_ALL = 0.95
"""Share of the hot sites whose promotion is waited for: the last few are a matter of chance."""

_WAIT_S = 30.0
_LOOK_EVERY_S = 0.01
_WARM_S = 0.5
_ARENA = "/memfd:optpoline"


def measure_many_sites() -> Iterator[Figure]:
    """Measure the way to the promotions, the stops, and the memory of both sides."""
    executable = _build()
    with Driver(f"{_N_SITES} sites", [str(executable)]) as driver:
        time.sleep(_WARM_S)
        with Controller(driver.pid) as controller:
            first_ns, most_ns = _wait(controller)
            memory_mb = _peak_memory_mb(controller.pid)
            reserved, resident = _arena_sizes(driver.pid)
    attached_ns = controller.said_ns(ATTACHED_LINE)
    summary = controller.summary
    if summary is None or attached_ns is None:
        raise BenchError("optpoline left no summary")
    what = f"{_N_SITES} sites: "
    begins = ((controller.started_ns, "start of the command"), (attached_ns, "attached"))
    for begin_ns, since in begins:
        yield Figure(
            name=f"{what}{since} to the first promotions",
            value=(first_ns - begin_ns) / 1e9,
            unit="s",
            bar=_FIRST_BAR_S,
        )
    if most_ns is not None:
        yield Figure(
            name=f"{what}attached to {_NEARLY_ALL:.0%} as many promoted as are hot",
            value=(most_ns - attached_ns) / 1e9,
            unit="s",
            bar=None,
        )
    yield Figure(
        name=what + ("hot ones promoted by then" if most_ns else "hot ones promoted in all"),
        value=_hot_share(summary),
        unit="of them",
        bar=None,
    )
    yield Figure(
        name=what + "controller's memory at most", value=memory_mb, unit="MB", bar=_MEMORY_BAR_MB
    )
    for size, n_sites, of in (
        (reserved, _N_SITES, "address space reserved, a site"),
        (resident, _N_SITES, "arena resident, a site"),
        (resident, summary.promoted, "arena resident, a promoted site"),
    ):
        yield Figure(name=what + of, value=size / max(1, n_sites), unit="bytes", bar=None)
    yield Figure(name=what + "longest stop", value=summary.stop_ms_max, unit="ms", bar=_STOP_BAR_MS)
    yield Figure(
        name=what + f"mean of {summary.stops} stops",
        value=summary.stop_ms_total / max(1, summary.stops),
        unit="ms",
        bar=None,
    )


def _build() -> Path:
    """Build the generated program with retpolines.

    Unoptimised: that takes a quarter of a minute, and a whole one with ``-O2``.
    """
    text = generate_busy_sites(_N_SITES, n_hot=_N_HOT)
    flags = (*variant_flags(Variant.RETPOLINE), "-O0")

    def build(directory: Path) -> Path:
        source = directory / "sites.c"
        source.write_text(text)
        return compile_program(
            [source], output=directory / "sites", flags=flags, libraries=("-pthread",)
        )

    return build_once(f"busy-{_N_SITES}", Variant.RETPOLINE, [text, *flags], build)


def _wait(controller: Controller) -> tuple[int, int | None]:
    """Wait until most that is hot was promoted; return when the first was, and most were."""
    deadline = time.monotonic() + _WAIT_S
    promotions: list[tuple[int, int]] = []
    while time.monotonic() < deadline and controller.is_running():
        promotions = controller.promotions()
        n_promoted = sum(n for _, n in promotions)
        if n_promoted >= _NEARLY_ALL * _N_HOT:
            return promotions[0][0], promotions[-1][0]
        time.sleep(_LOOK_EVERY_S)
    if not promotions:
        raise BenchError(f"nothing was promoted:\n{controller.words()}")
    return promotions[0][0], None


def _hot_share(summary: Summary) -> float:
    """Return which share of the hot functions had their site promoted at the end."""
    hot = {f"function_{number}" for number in busy_functions(_N_SITES, _N_HOT)}
    return len(hot.intersection(summary.promoted_functions)) / len(hot)


def _peak_memory_mb(pid: int) -> float:
    """Return the greatest resident memory that a process has had."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"/proc/{pid}/status does not tell the memory of the controller")


def _arena_sizes(pid: int) -> tuple[int, int]:
    """Return the bytes of a program's arenas: reserved, and resident for whoever touched them."""
    files: dict[int, os.stat_result] = {}
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        fields = line.split(maxsplit=5)
        if len(fields) == 6 and fields[5].startswith(_ARENA):
            start, end = (int(addr, 16) for addr in fields[0].split("-"))
            found = os.stat(f"/proc/{pid}/map_files/{start:x}-{end:x}")
            files[found.st_ino] = found
    if not files:
        raise BenchError(f"process {pid} has no arena")
    return (
        sum(found.st_size for found in files.values()),
        sum(512 * found.st_blocks for found in files.values()),
    )
