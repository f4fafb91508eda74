# SPDX-License-Identifier: Apache-2.0
"""One stop of a program at a time, whoever makes it.

A thread has one tracer. A controller that works on a program for hours, and a command that
switches a key of it meanwhile, both stop it for a moment now and then, and must not meet:
who came second would find its threads traced by another. So a stop is made under a lock,
an abstract Unix socket address, which the kernel releases when its holder dies. It is a
courtesy, no more: in another network namespace it is not seen, and then ptrace tells.
"""

from __future__ import annotations

import errno
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["one_stop_at_a_time"]

_POLL_S = 0.0002


@contextmanager
def one_stop_at_a_time(pid: int, *, timeout_ns: int) -> Iterator[None]:
    """Hold the lock on stops of a process for a block; wait for it as long as a stop may take.

    Args:
        pid: The process.
        timeout_ns: When not to wait any longer, and stop all the same.
    """
    end_ns = time.monotonic_ns() + timeout_ns
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as held:
        while True:
            try:
                held.bind(f"\0optpoline-stop-{pid}")
                break
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic_ns() >= end_ns:
                    break
            time.sleep(_POLL_S)
        yield
