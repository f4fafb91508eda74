# SPDX-License-Identifier: Apache-2.0
"""Real-time priority for a moment, where we may have it."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["at_real_time"]

_FIFO_PRIORITY = 1


@contextmanager
def at_real_time() -> Iterator[None]:
    """Run a block at real-time priority, if allowed; threads that it starts have it as well."""
    tid = threading.get_native_id()
    policy = os.sched_getscheduler(tid)
    param = os.sched_getparam(tid)
    try:
        os.sched_setscheduler(tid, os.SCHED_FIFO, os.sched_param(_FIFO_PRIORITY))
        is_raised = True
    except OSError:
        is_raised = False  # not permitted: RLIMIT_RTPRIO, or a group without real-time share
    try:
        yield
    finally:
        if is_raised:
            os.sched_setscheduler(tid, policy, param)
