# SPDX-License-Identifier: Apache-2.0
"""Run operation vectors on behalf of a CPU while the program runs.

One run::

    1. validate the whole vector                     (learn/operations.py)
    2. exclude: pin to the CPU, else stop threads    (exclusion.py)
    3. evaluate on a shadow; if the exclusion was undermined meanwhile, begin again
    4. commit by aligned 8-byte stores, in the vector's order
    5. look whether the exclusion has lasted, let everybody go, tell the event

What can fail fails before 4. A store that was made while the exclusion broke (microseconds)
cannot be taken back: the event's ``is_exclusive`` says so.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.address_space import AddressSpace
from optpoline.controller.exclusion import Exclusion, Way, pinned, stopped
from optpoline.errors import ExclusionError, OperationError, OptpolineError
from optpoline.learn.operations import (
    Evaluation,
    Operation,
    OperationResult,
    evaluate,
    touched_cells,
    validate,
)
from optpoline.model import Addr, CounterRows
from optpoline.process.stop import Wake

__all__ = ["MAX_ATTEMPTS", "CounterMemory", "Executor", "OperationEvent"]

MAX_ATTEMPTS = 8
"""Exclusions tried for one vector. One takes 0.05 ms, or a stop; to be undermined is an event of
other real-time work on that CPU, or of a sleeper that wakes in just that time."""


class CounterMemory(Protocol):
    """Counter rows as the controller has them mapped; an ``Arena`` is one."""

    @property
    def rows(self) -> CounterRows:
        """Where the rows are in the program."""

    def load_u64(self, addr: Addr) -> int:
        """Return a cell."""

    def store_u64(self, addr: Addr, value: int) -> None:
        """Store a cell, in one store."""

    def columns(self, addr: Addr, n_cells: int) -> NDArray[np.uint64]:
        """Return adjacent cells of all rows as they are: u64[1 + n_cpus][n_cells], a copy."""

    @property
    def own_rows_addr(self) -> int:
        """Where row 0 is in this process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationEvent:
    """One run, of a vector or of a part of a drain.

    Attributes:
        time_ns: When it ended, CLOCK_MONOTONIC.
        duration_ns: How long it took, validation and exclusion included.
        cpu: On whose behalf; None for row 0 alone.
        way: How nobody else came between; None if it did not get that far.
        why_not: Why a way that is tried before it was not taken, or None.
        operations: The vector; empty for a drain.
        n_drained: Cells and pairs that a drain dealt with.
        result: How a vector ended; None for a drain and after an error.
        error: What went wrong, or None.
        is_exclusive: Whether it is certain that nobody came between.
    """

    time_ns: int
    duration_ns: int
    cpu: int | None
    way: Way | None
    why_not: str | None
    operations: tuple[Operation, ...] = ()
    n_drained: int = 0
    result: OperationResult | None = None
    error: str | None = None
    is_exclusive: bool = True


class Executor:
    """Runs vectors on the counters of one target.

    Args:
        memories: The target's counter memories as they are now.
        spaces: The target and every process that shares its counters.
        unreadable: Processes that may share them but may not be looked at.
        on_event: Called after each run, when everybody runs again.
    """

    def __init__(
        self,
        *,
        memories: Callable[[], Sequence[CounterMemory]],
        spaces: Callable[[], Sequence[AddressSpace]],
        unreadable: Callable[[], Sequence[int]] = tuple,
        on_event: Callable[[OperationEvent], None] | None = None,
    ) -> None:
        """Nothing is touched before a run."""
        self._memories = memories
        self._spaces = spaces
        self._unreadable = unreadable
        self._on_event = on_event

    def run(
        self, cpu: int | None, operations: Sequence[Operation], *, way: Way | None = None
    ) -> OperationResult:
        """Run a vector, all of it or nothing.

        Args:
            cpu: On whose behalf; None for cells of row 0 alone.
            operations: Up to 16, on cells of one counter memory.
            way: The only way to be tried; None to pin where that excludes, else stop.

        Raises:
            OperationError: if the vector is not valid, or nobody could be excluded.
            ProcessGone: if the target is gone.
            StopTimeout: if its threads do not stop in time.
        """
        run = _Run(time.monotonic_ns(), cpu, tuple(operations))
        try:
            memory = self._memory_of(run.operations)
            validate(run.operations, memory.rows, cpu)
            self._run(run, memory, way)
        except OptpolineError as error:
            run.error = str(error)
            raise
        finally:
            self.tell(run.event())
        assert run.result is not None
        return run.result

    def _memory_of(self, operations: Sequence[Operation]) -> CounterMemory:
        """Return the counter memory that a vector is about: that of its first cell."""
        memories = self._memories()
        if not memories:
            raise OperationError(None, "there are no counters")
        for index, operation in enumerate(operations):
            for addr, _ in touched_cells(operation):
                for memory in memories:
                    if 0 <= addr - memory.rows.shared_addr < memory.rows.size:
                        return memory
                raise OperationError(index, f"{addr:#x} is no counter cell")
        return memories[0]

    def _run(self, run: _Run, memory: CounterMemory, way: Way | None) -> None:
        """Exclude, evaluate and commit."""
        if way in (None, Way.PINNED):
            run.why_not = why_not_pinned(run.operations, memory.rows, run.cpu)
            if run.why_not is None and run.cpu is not None:
                try:
                    self._attempt(run, memory, partial(_pin, run.cpu))
                    return
                except ExclusionError as error:
                    run.why_not = str(error)
            if way is Way.PINNED:
                raise OperationError(None, f"cannot pin: {run.why_not}")
        try:
            self._attempt(run, memory, self.stopping)
        except ExclusionError as error:
            raise OperationError(None, str(error)) from error

    def stopping(self, attempt: int = 0) -> AbstractContextManager[Exclusion]:
        """Return what stops every process that maps the counters; the same at every attempt.

        Sleepers that will not notice stand as well: some programs' wake every few
        microseconds, and who wakes may count.

        Raises:
            ExclusionError: if there is one that may not even be looked at.
        """
        spaces = self._spaces()
        for pid in self._unreadable():
            raise ExclusionError(
                f"process {pid} may count in the same cells and may not be looked at"
            )
        return stopped(spaces, wake=Wake.UNNOTICED)

    def _attempt(
        self,
        run: _Run,
        memory: CounterMemory,
        exclude: Callable[[int], AbstractContextManager[Exclusion]],
    ) -> None:
        """Evaluate under an exclusion that lasts, and commit."""
        for attempt in range(MAX_ATTEMPTS):
            with exclude(attempt) as exclusion:
                evaluation = evaluate(run.operations, memory.load_u64)
                if not exclusion.is_intact():
                    continue
                _commit(memory, evaluation)
                run.way, run.result = exclusion.way, evaluation.result
                run.is_exclusive = not evaluation.stores or exclusion.is_intact()
                return
        raise ExclusionError(f"an exclusion was undermined {MAX_ATTEMPTS} times on end")

    def tell(self, event: OperationEvent) -> None:
        """Hand an event on."""
        if self._on_event is not None:
            self._on_event(event)


class _Run:
    """What becomes of one vector."""

    def __init__(self, begin_ns: int, cpu: int | None, operations: tuple[Operation, ...]) -> None:
        """Begin."""
        self.begin_ns = begin_ns
        self.cpu = cpu
        self.operations = operations
        self.way: Way | None = None
        self.why_not: str | None = None
        self.result: OperationResult | None = None
        self.error: str | None = None
        self.is_exclusive = True

    def event(self) -> OperationEvent:
        """Return it as an event that ends now."""
        now_ns = time.monotonic_ns()
        return OperationEvent(
            time_ns=now_ns,
            duration_ns=now_ns - self.begin_ns,
            cpu=self.cpu,
            way=self.way,
            why_not=self.why_not,
            operations=self.operations,
            result=self.result,
            error=self.error,
            is_exclusive=self.is_exclusive,
        )


def why_not_pinned(
    operations: Sequence[Operation], rows: CounterRows, cpu: int | None
) -> str | None:
    """Return why pinning does not exclude who writes the cells of a vector; None if it does."""
    if cpu is None:
        return "row 0 is written from every CPU"
    if rows.rseq is None:
        return "without rseq the row of a CPU is written from others as well"
    for operation in operations:
        for addr, _ in touched_cells(operation):
            if addr < rows.shared_addr + rows.row_size:
                return "row 0, which it touches, is written from every CPU"
    return None


def _pin(cpu: int, attempt: int) -> AbstractContextManager[Exclusion]:
    """Pin; the same at every attempt."""
    return pinned(cpu)


def _commit(memory: CounterMemory, evaluation: Evaluation) -> None:
    """Make the stores, each in one piece; under an exclusion."""
    for addr, value in evaluation.stores:
        memory.store_u64(addr, value)
