# SPDX-License-Identifier: Apache-2.0
"""The program whose loops call, and ask for switches, in all ways: built, run, and changed.

It is built in several *layouts*: where in a line of the cache loops and callees begin, and how
far apart they are, makes a difference of as much as what is to be compared.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import optpoline
from bench.build import Variant, build_once, compile_program, variant_flags
from bench.driver import Driver
from bench.errors import BenchError
from bench.paths import BENCH

__all__ = ["FORMS", "LAYOUTS", "Calls", "Layout", "build_calls", "changed"]

_SOURCES = (BENCH / "declared" / "calls.c", BENCH / "declared" / "out_of_line.c")
_HEADER = BENCH / "declared" / "calls.h"
_LINE_SIZE = 64
_OFFSET_STEP = 8
_GAP_STEP = 448
_UNALIGNED = (
    "-fno-toplevel-reorder",
    "-fno-align-functions",
    "-fno-align-loops",
    "-fno-align-jumps",
    "-fno-align-labels",
)
FORMS = (
    "empty",
    "direct",
    "pointer",
    "retpoline",
    "dynamic",
    "dynamic_plain",
    "static_inline",
    "static_out_of_line",
    "key",
    "variable_off",
    "variable_on",
)
"""Names of its loops."""

_SUM = 3
_SUMS = {"key": (3, 8), "variable_on": (8,)}
"""What a round adds to its loop's result; 5 of it where something is switched on."""

_LEARNED = ("dynamic", "dynamic_plain")
_LEARN_S = 0.2
_TRIES = 10
_ROUNDS = 500_000
"""At a time while it learns: a few milliseconds, so that all forms come by in a window."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Where things lie.

    Attributes:
        loop_off: Bytes from the beginning of a line to a loop's function.
        callee_off: The same for callees.
        gap_size: Bytes between loops and callees.
    """

    loop_off: int
    callee_off: int
    gap_size: int

    @property
    def flags(self) -> tuple[str, ...]:
        """Flags for the compiler."""
        return (
            f"-DLOOP_OFFSET={self.loop_off}",
            f"-DCALLEE_OFFSET={self.callee_off}",
            f"-DGAP={self.gap_size}",
        )


# Callees move three steps where loops move one, so each layout has another distance as well.
LAYOUTS = tuple(
    Layout(loop_off=off, callee_off=3 * off % _LINE_SIZE, gap_size=_GAP_STEP * number)
    for number, off in enumerate(range(0, _LINE_SIZE, _OFFSET_STEP))
)


def build_calls(layout: Layout, *, is_pie: bool = True) -> Path:
    """Build the program in a layout, position-independent or not."""
    position = ("-fPIE", "-pie") if is_pie else ("-fno-pie", "-no-pie")
    flags = (*variant_flags(Variant.PLUGIN), *_UNALIGNED, *position, *layout.flags)

    def build(directory: Path) -> Path:
        return compile_program(_SOURCES, output=directory / "calls", flags=flags)

    name = f"declared-{'pie' if is_pie else 'fixed'}-{layout.loop_off}"
    return build_once(name, Variant.PLUGIN, [*_SOURCES, _HEADER, *flags], build)


class Calls:
    """One running instance; leaving the ``with`` block ends it."""

    def __init__(self, executable: Path) -> None:
        """Start it and wait until it is ready."""
        self._driver = Driver("the program of declared calls", [str(executable)])

    @property
    def pid(self) -> int:
        """Its process id."""
        return self._driver.pid

    def run(self, form: str, rounds: int) -> int:
        """Run a form's loop; return the CPU time in nanoseconds.

        Raises:
            BenchError: if it computes something wrong.
        """
        elapsed, _, result = self._driver.ask(f"{form} {rounds}").partition(" ")
        if int(result) not in [each * rounds for each in _SUMS.get(form, (_SUM,))]:
            raise BenchError(f"{rounds} rounds of {form} computed {result}")
        return int(elapsed)

    def find_loop(self, form: str) -> int:
        """Return the address of a form's loop."""
        return int(self._driver.ask(f"where {form}"), 16)

    def __enter__(self) -> Calls:
        """Return the running program."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        self._driver.close()


@contextlib.contextmanager
def changed(calls: Calls) -> Iterator[optpoline.Session]:
    """Promote its dynamic calls, set its static calls and enable its key, for a block."""
    with optpoline.attach(calls.pid) as session:
        n_promoted = 0
        for _ in range(_TRIES):
            with _running(calls):
                session.learn(_LEARN_S)
            n_promoted += session.promote()
            if n_promoted == len(_LEARNED):
                break
        else:
            raise BenchError(f"{n_promoted} of {len(_LEARNED)} dynamic calls were promoted")
        with session.transaction() as transaction:
            transaction.static_call("chosen").update("hot")
            transaction.static_call("elsewhere").update("hot")
            transaction.key("feature").enable()
        yield session


@contextlib.contextmanager
def _running(calls: Calls) -> Iterator[None]:
    """Have it make its dynamic calls while the block runs."""
    is_over = threading.Event()

    def run() -> None:
        while not is_over.is_set():
            for form in _LEARNED:
                calls.run(form, _ROUNDS)

    with ThreadPoolExecutor(max_workers=1) as pool:
        running: Future[None] = pool.submit(run)
        try:
            yield
        finally:
            is_over.set()
        running.result()
