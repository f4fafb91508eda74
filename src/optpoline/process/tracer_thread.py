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
from typing import TypeVar

from optpoline.process.ptrace import Tracer

__all__ = ["TracerThread"]

_T = TypeVar("_T")
_POLL_S = 50e-6
_STALL_S = 0.02


class TracerThread:
    """Runs functions, one at a time, on its own OS thread.

    Attributes:
        on_stall: Called by the waiting thread, over and over, while a function takes long.
    """

    def __init__(self) -> None:
        """Start the thread."""
        self.on_stall: Callable[[], None] | None = None
        self._requests: SimpleQueue[Callable[[Tracer], None] | None] = SimpleQueue()
        self._outcomes: SimpleQueue[BaseException | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="optpoline-tracer", daemon=True)
        self._thread.start()

    def call(self, work: Callable[[Tracer], _T]) -> _T:
        """Run a function there and return its result or raise its exception."""
        results: list[_T] = []
        self._requests.put(lambda tracer: results.append(work(tracer)))
        try:
            error = self._wait()
        except BaseException:
            # Interrupted while waiting (Ctrl-C): what runs there ends by its own
            # deadline, and its outcome must not be taken for the next one's.
            self._wait()
            raise
        if error is not None:
            raise error
        return results[0]

    def finish(self) -> None:
        """End the thread; on return the kernel has let go of every tracee."""
        tid = self._thread.native_id
        self._requests.put(None)
        self._thread.join()
        # join() returns a little before the OS thread is gone.
        while tid is not None and os.path.exists(f"/proc/self/task/{tid}"):
            time.sleep(_POLL_S)

    def _wait(self) -> BaseException | None:
        """Return the outcome of the function that runs."""
        while True:
            try:
                return self._outcomes.get(timeout=_STALL_S)
            except Empty:
                if self.on_stall is not None:
                    self.on_stall()

    def _serve(self) -> None:
        """Run requests until told to end."""
        tracer = Tracer()
        while (request := self._requests.get()) is not None:
            outcome: BaseException | None = None
            try:
                request(tracer)
            except BaseException as error:
                outcome = error
            self._outcomes.put(outcome)
