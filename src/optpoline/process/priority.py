# SPDX-License-Identifier: Apache-2.0
"""Real-time priority for a moment, where we may have it."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

__all__ = ["at_real_time"]

_FIFO_PRIORITY = 1


@contextmanager
def at_real_time(priorities: Sequence[int] = (_FIFO_PRIORITY,)) -> Iterator[bool]:
    """Run a block at real-time priority, if allowed; threads that it starts have it as well.

    Args:
        priorities: Those that would do, the best first.

    Yields:
        Whether one was allowed: it takes CAP_SYS_NICE or RLIMIT_RTPRIO, and a group that has
        real-time share.
    """
    policy, param = os.sched_getscheduler(0), os.sched_getparam(0)
    is_raised = any(map(_raise_to, priorities))
    try:
        yield is_raised
    finally:
        if is_raised:
            os.sched_setscheduler(0, policy, param)


def _raise_to(priority: int) -> bool:
    """Give this thread a real-time priority; tell whether that is allowed."""
    try:
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(priority))
    except OSError:
        return False
    return True
