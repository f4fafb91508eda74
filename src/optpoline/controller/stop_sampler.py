# SPDX-License-Identifier: Apache-2.0
"""Sample where threads are by stopping them: for where no clock event is to be had.

Each stop gives one sample of each thread that runs, with the top of its stack. Threads
that sleep are left alone, and have nothing to say. Unlike clock events this disturbs the
program, for as long as a stop takes; so it is done for short windows, and rarely.
"""

from __future__ import annotations

import time

from optpoline.controller.target import Target
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.process.perf import PcSample

__all__ = ["STOP_EVERY_S", "StopSampler"]

STOP_EVERY_S = 0.005
"""Time between stops; one takes 0.1 to 0.3 ms."""

_WORD_SIZE = 8


class StopSampler:
    """Samples by stopping all running threads for an instant, now and then.

    Args:
        target: The target.
        n_stack_words: Words of the stack that each sample shall have.
    """

    def __init__(self, target: Target, *, n_stack_words: int) -> None:
        """Stop nobody yet."""
        self._target = target
        self._n_stack_words = n_stack_words

    def sample(self, seconds: float) -> tuple[PcSample, ...]:
        """Watch for a while."""
        samples: list[PcSample] = []
        end_s = time.monotonic() + seconds
        while True:
            samples += self._look()
            left_s = end_s - time.monotonic()
            if left_s <= 0:
                return tuple(samples)
            time.sleep(min(left_s, STOP_EVERY_S))

    def _look(self) -> list[PcSample]:
        """Stop the running threads once and see where they are."""
        with self._target.stop() as stop:
            running = [thread for thread in stop.stopped if not thread.in_syscall]
            stacks = [self._read_stack(thread.sp) for thread in running]
        return [
            PcSample(tid=thread.tid, pc=thread.pc, stack=stack)
            for thread, stack in zip(running, stacks, strict=True)
        ]

    def _read_stack(self, sp: Addr) -> tuple[int, ...]:
        """Read the top of a stack; nothing if it ends before."""
        size = _WORD_SIZE * self._n_stack_words
        try:
            data = self._target.memory.read(sp, size)
        except TargetFault:
            return ()
        return tuple(memoryview(data).cast("Q"))
