# SPDX-License-Identifier: Apache-2.0
"""What attaching costs the program and the machine: stops, time, processor, memory.

All is seen from outside, except the length of the stops, which optpoline tells itself.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from bench import statistics
from bench.build import Variant, build_once, compile_program, variant_flags
from bench.commands import require_command
from bench.controller import ATTACHED_LINE, PROMOTED_LINE, Controller, attach_and_settle
from bench.driver import Driver
from bench.errors import BenchError
from bench.gen_sites import generate_sites
from bench.workload import Workload, learning_slowdown

__all__ = ["Figure", "measure_quiet", "measure_sites"]

_STOP_BARS_MS = {50: 2.0, 2000: 10.0}
_LEFT_OUT_RATIO = 0.02
_LEARN_S = 1.0
_PROMOTE_BAR_S = 0.5
_SLOWDOWN_BAR = 1.35
_CPU_BAR = 0.01
_MEMORY_BAR_MB = 120.0
_QUIET_S = 60.0
_SHARE_S = 20.0
_BEFORE = 7
"""Iterations before attaching, whose median is what learning is compared with."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number with the most, or the least, it may be.

    Attributes:
        name: What was measured.
        value: The number.
        unit: Its unit.
        bar: The most it may be; None where it is only reported.
        is_least: Whether the bar is the least it may be.
    """

    name: str
    value: float
    unit: str
    bar: float | None
    is_least: bool = False

    @property
    def verdict(self) -> str:
        """Whether it is within its bar, in a word."""
        if self.bar is None:
            return "reported"
        is_met = self.value >= self.bar if self.is_least else self.value <= self.bar
        return "met" if is_met else "MISSED"

    @property
    def bar_text(self) -> str:
        """Its bar in a few characters."""
        if self.bar is None:
            return ""
        return f"{'≥' if self.is_least else '≤'} {self.bar:g}"


def measure_sites(n_sites: int) -> Iterator[Figure]:
    """Measure stops, the way to the first promotion and learning with so many sites."""
    executable = _build_sites(n_sites)
    with Driver(f"{n_sites} sites", [str(executable)]) as driver:
        before = [driver.iterate() for _ in range(_BEFORE)]
        with attach_and_settle(driver.pid, driver.iterate) as controller:
            pass
    if controller.summary is None:
        raise BenchError("optpoline left no summary")
    what = f"{n_sites} sites: "
    yield Figure(
        name=what + "not promoted, though all are equally hot",
        value=float(controller.summary.sites - controller.summary.promoted),
        unit="sites",
        bar=_LEFT_OUT_RATIO * n_sites,
    )
    yield Figure(
        name=what + "longest stop",
        value=controller.summary.stop_ms_max,
        unit="ms",
        bar=_STOP_BARS_MS[n_sites],
    )
    promoted = controller.said_ns(PROMOTED_LINE)
    attached = controller.said_ns(ATTACHED_LINE)
    if promoted is not None:
        yield Figure(
            name=what + "start of the command to the first promotion, less the learning window",
            value=(promoted - controller.started_ns) / 1e9 - _LEARN_S,
            unit="s",
            bar=_PROMOTE_BAR_S,
        )
    if promoted is not None and attached is not None:
        yield Figure(
            name=what + "attached to the first promotion, less the learning window",
            value=(promoted - attached) / 1e9 - _LEARN_S,
            unit="s",
            bar=_PROMOTE_BAR_S,
        )
    slowdown = learning_slowdown(controller, statistics.median(before).value)
    if slowdown is not None:
        yield Figure(
            name=what + "time while learning, compared with before",
            value=slowdown,
            unit="x",
            bar=_SLOWDOWN_BAR,
        )


def measure_quiet(workload: Workload, executable: Path) -> Iterator[Figure]:
    """Watch the controller once it has settled: system calls, processor time, memory."""
    strace = require_command("strace", package="strace")
    with contextlib.ExitStack() as stack:
        worker = stack.enter_context(workload.start(executable, workload.name))
        controller = stack.enter_context(attach_and_settle(worker.pid, worker.iterate))
        with _tracing(strace, controller) as log:
            begin_s = time.monotonic()
            while time.monotonic() - begin_s < _QUIET_S:
                worker.iterate()
        calls = sum("ptrace(" in line for line in log.read_text().splitlines())
        log.unlink()
        yield Figure(
            name=f"settled: ptrace calls in {_QUIET_S:.0f} s, seen by strace",
            value=float(calls),
            unit="calls",
            bar=0.0,
        )
        begin_s, begin_cpu_s = time.monotonic(), _cpu_s(controller.pid)
        while time.monotonic() - begin_s < _SHARE_S:
            worker.iterate()
        used_s = _cpu_s(controller.pid) - begin_cpu_s
        yield Figure(
            name="settled: controller's share of a core",
            value=used_s / (time.monotonic() - begin_s),
            unit="of a core",
            bar=_CPU_BAR,
        )
        yield Figure(
            name="settled: controller's memory",
            value=_memory_mb(controller.pid),
            unit="MB",
            bar=_MEMORY_BAR_MB,
        )


@contextlib.contextmanager
def _tracing(strace: str, controller: Controller) -> Iterator[Path]:
    """Trace the controller's ptrace calls into a file while the block runs."""
    handle, name = tempfile.mkstemp(prefix="strace-")
    os.close(handle)
    log = Path(name)
    tracer = subprocess.Popen(
        [strace, "-f", "-e", "trace=ptrace", "-o", name, "-p", str(controller.pid)],
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        said = tracer.stderr.readline() if tracer.stderr else ""
        if "attached" not in said:
            raise BenchError(f"strace cannot watch the controller: {said.strip()}")
        yield log
        if tracer.poll() is not None:
            raise BenchError(f"strace ended early with status {tracer.returncode}")
    finally:
        tracer.send_signal(signal.SIGINT)
        tracer.wait(timeout=10)
        if tracer.stderr:
            tracer.stderr.close()


def _build_sites(n_sites: int) -> Path:
    """Build the generated program with retpolines."""
    text = generate_sites(n_sites)
    flags = variant_flags(Variant.RETPOLINE)

    def build(directory: Path) -> Path:
        source = directory / "sites.c"
        source.write_text(text)
        return compile_program([source], output=directory / "sites", flags=flags)

    return build_once(f"sites-{n_sites}", Variant.RETPOLINE, [text, *flags], build)


def _cpu_s(pid: int) -> float:
    """Processor time of a process, all threads, by the scheduler's own count."""
    tasks = Path(f"/proc/{pid}/task").iterdir()
    return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks) / 1e9


def _memory_mb(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise BenchError(f"/proc/{pid}/status does not tell the memory of the controller")
