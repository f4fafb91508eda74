# SPDX-License-Identifier: Apache-2.0
"""A program whose indirect calls follow a distribution that is changed while it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.driver import Driver
from bench.errors import BenchError
from bench.paths import BENCH

__all__ = ["Phases", "Snap", "build_phases"]

_SOURCE = BENCH / "phases" / "phases.c"


@dataclass(frozen=True, slots=True, kw_only=True)
class Snap:
    """How far the program has come.

    Attributes:
        calls: Indirect calls made by all threads.
        cpu_ns: CPU time they took.
    """

    calls: int
    cpu_ns: int

    def __add__(self, other: Snap) -> Snap:
        """Return both together."""
        return Snap(calls=self.calls + other.calls, cpu_ns=self.cpu_ns + other.cpu_ns)

    def __sub__(self, earlier: Snap) -> Snap:
        """Return what came since."""
        return Snap(calls=self.calls - earlier.calls, cpu_ns=self.cpu_ns - earlier.cpu_ns)

    @property
    def speed(self) -> float:
        """Calls per microsecond of CPU time."""
        return 1000 * self.calls / self.cpu_ns


def build_phases(variant: Variant = Variant.RETPOLINE) -> Path:
    """Build the program."""
    flags = variant_flags(variant)

    def build(directory: Path) -> Path:
        return compile_program(
            [_SOURCE], output=directory / "phases", flags=flags, libraries=("-pthread",)
        )

    return build_once("phases", variant, [_SOURCE, *flags], build)


class Phases:
    """One running instance; leaving the ``with`` block ends it and checks its results.

    Args:
        executable: What ``build_phases`` built.
        n_threads: Threads that make calls.
        start: The distribution to begin with.
    """

    def __init__(self, executable: Path, *, n_threads: int = 1, start: str = "one") -> None:
        """Start it and wait until it is ready."""
        self._driver = Driver("the program with phases", [str(executable), str(n_threads)])
        self.go(start)

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._driver.pid

    def go(self, distribution: str) -> None:
        """Make its calls follow a distribution from now on."""
        if self._driver.ask(f"go {distribution}") != "ok":
            raise BenchError(f"there is no distribution {distribution}")

    def snap(self) -> Snap:
        """Return how far it has come."""
        calls, cpu_ns = self._driver.ask("snap").split()
        return Snap(calls=int(calls), cpu_ns=int(cpu_ns))

    def speed(self, seconds: float) -> float:
        """Let it run for a while; return its calls per microsecond of CPU time."""
        before = self.snap()
        time.sleep(seconds)
        return (self.snap() - before).speed

    def __enter__(self) -> Phases:
        """Return the running program."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End it; a call that went wrong is an error."""
        try:
            if error is None and (wrong := self._driver.ask("result")) != "0":
                raise BenchError(f"{wrong} rounds of the program with phases went wrong")
        finally:
            self._driver.close()
