# SPDX-License-Identifier: Apache-2.0
"""A throwaway OS thread that makes all ptrace requests of one stop.

The kernel ties tracees to an OS thread, and a tracee that is not stopped can
only be let go by that thread's end (PTRACE_DETACH needs a stop). A thread in
uninterruptible sleep would otherwise keep us for ever. So each stop has a
thread of its own, and its end is the guarantee that nothing stays traced.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from queue import Empty, SimpleQueue
from typing import Generic, TypeVar

from optpoline.process.ptrace import Tracer
from optpoline.process.timer_slack import end_sleeps_on_time

__all__ = ["TracerThread"]

_T = TypeVar("_T")
_POLL_S = 50e-6
_STALL_S = 0.02


class _Job(Generic[_T]):
    """One function to run, and what became of it."""

    def __init__(self, work: Callable[[Tracer], _T]) -> None:
        """Run nothing yet."""
        self._work = work
        self._results: list[_T] = []
        self._error: BaseException | None = None
        self._bell: SimpleQueue[None] = SimpleQueue()
        self._is_done = False

    def run(self, tracer: Tracer) -> None:
        """Run it; on the tracer thread."""
        try:
            self._results.append(self._work(tracer))
        except BaseException as error:
            self._error = error
        self._is_done = True
        self._bell.put(None)

    def wait(self, on_stall: Callable[[], None] | None) -> None:
        """Wait until it is done; may be interrupted anywhere, and called again."""
        while not self._is_done:
            try:
                self._bell.get(timeout=_STALL_S)
            except Empty:
                if on_stall is not None:
                    on_stall()

    def outcome(self) -> _T:
        """Return its result or raise its exception."""
        if self._error is not None:
            raise self._error
        return self._results[0]


class TracerThread:
    """Runs functions, one at a time, on its own OS thread.

    Attributes:
        on_stall: Called by the waiting thread, over and over, while a function takes long.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self.on_stall: Callable[[], None] | None = None
        self._tracer: Tracer | None = None
        self._jobs: SimpleQueue[Callable[[Tracer], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="optpoline-tracer", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Tracer], _T]) -> _T:
        """Run a function there and return its result or raise its exception.

        Whoever is interrupted (Ctrl-C) before that gets the interrupt, once what runs there
        has ended by its own deadline. An interrupt may also come just when it ends, so that
        is noted in the job, where nobody can take it away twice, or for another job's.

        A function that runs there may call others: each is run at once.
        """
        if self._tracer is not None and threading.current_thread() is self._thread:
            return work(self._tracer)
        job = _Job(work)
        self._jobs.put(job.run)
        try:
            job.wait(self.on_stall)
        except BaseException:
            job.wait(self.on_stall)
            raise
        return job.outcome()

    def finish(self) -> None:
        """End the thread; on return the kernel has let go of every tracee."""
        tid = self._thread.native_id
        self._jobs.put(None)
        self._thread.join()
        # join() returns a little before the OS thread is gone.
        while tid is not None and os.path.exists(f"/proc/self/task/{tid}"):
            time.sleep(_POLL_S)

    def _serve(self) -> None:
        """Run jobs until told to end."""
        # The target stands while this thread waits.
        end_sleeps_on_time()
        self._tracer = Tracer()
        while (run := self._jobs.get()) is not None:
            run(self._tracer)
