# SPDX-License-Identifier: Apache-2.0
"""How much later than asked for a thread's sleeps may end.

The kernel groups wake-ups within a thread's *timer slack*, 50 us unless it says otherwise
(prctl(2), PR_SET_TIMERSLACK). A stop is made of waits of 10 us and more for a thread of
the target, two for each injected call: they took 65 us each with that slack, 15 without.
"""

from __future__ import annotations

import ctypes

__all__ = ["end_sleeps_on_time"]

_PR_SET_TIMERSLACK = 29
_LEAST_NS = 1

_libc = ctypes.CDLL(None)


def end_sleeps_on_time() -> None:
    """Let the calling thread's sleeps end on time, as far as the kernel can."""
    # What fails here is late, nothing else.
    _libc.prctl(_PR_SET_TIMERSLACK, ctypes.c_ulong(_LEAST_NS), 0, 0, 0)
