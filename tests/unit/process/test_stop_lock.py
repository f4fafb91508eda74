# SPDX-License-Identifier: Apache-2.0
"""Stops of one process wait for each other, but not for ever."""

from __future__ import annotations

import os
import threading
import time

from optpoline.process.stop_lock import one_stop_at_a_time

SOON_NS = 20_000_000
LONG_NS = 10_000_000_000


def test_stops_of_one_process_wait_for_each_other() -> None:
    order: list[str] = []
    is_held = threading.Event()

    def hold() -> None:
        with one_stop_at_a_time(os.getpid(), timeout_ns=LONG_NS):
            is_held.set()
            time.sleep(0.02)
            order.append("first")

    first = threading.Thread(target=hold)
    first.start()
    is_held.wait()
    with one_stop_at_a_time(os.getpid(), timeout_ns=LONG_NS):
        order.append("second")
    first.join()
    assert order == ["first", "second"]


def test_stops_of_two_processes_do_not() -> None:
    begin_ns = time.monotonic_ns()
    with (
        one_stop_at_a_time(os.getpid(), timeout_ns=LONG_NS),
        one_stop_at_a_time(os.getppid(), timeout_ns=LONG_NS),
    ):
        assert time.monotonic_ns() - begin_ns < LONG_NS


def test_a_stop_is_made_all_the_same_after_a_while() -> None:
    with one_stop_at_a_time(os.getpid(), timeout_ns=LONG_NS):
        begin_ns = time.monotonic_ns()
        with one_stop_at_a_time(os.getpid(), timeout_ns=SOON_NS):
            assert SOON_NS <= time.monotonic_ns() - begin_ns < LONG_NS
