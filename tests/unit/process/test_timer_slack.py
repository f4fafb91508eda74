# SPDX-License-Identifier: Apache-2.0
"""The timer slack of the thread that waits while the target stands."""

from __future__ import annotations

import threading
from pathlib import Path

from optpoline.process.timer_slack import end_sleeps_on_time
from optpoline.process.tracer_thread import TracerThread


def read_slack_ns() -> int:
    """Return the calling thread's slack, as the kernel has it."""
    return int(Path(f"/proc/{threading.get_native_id()}/timerslack_ns").read_text())


def test_the_calling_thread_has_hardly_any() -> None:
    seen: list[int] = []

    def look() -> None:
        end_sleeps_on_time()
        seen.append(read_slack_ns())

    thread = threading.Thread(target=look)
    thread.start()
    thread.join()
    assert seen == [1]


def test_only_tracer_threads_have_it() -> None:
    before = read_slack_ns()
    tracer_thread = TracerThread()
    try:
        assert tracer_thread.call(lambda _: read_slack_ns()) == 1
    finally:
        tracer_thread.finish()
    assert read_slack_ns() == before
