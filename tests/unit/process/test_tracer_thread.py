# SPDX-License-Identifier: Apache-2.0
"""The thread that makes ptrace requests, and those who wait for it and are interrupted."""

from __future__ import annotations

import sys
import threading
from types import FrameType

import pytest

from optpoline.process.tracer_thread import TracerThread

_TIMEOUT_S = 5.0


def test_results_and_errors_come_back() -> None:
    thread = TracerThread()
    assert thread.call(lambda _: threading.current_thread().name) == "optpoline-tracer"
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda _: 1 // 0)
    thread.finish()


def test_a_function_that_runs_there_calls_others_at_once() -> None:
    thread = TracerThread()
    tracers = thread.call(lambda tracer: [tracer, thread.call(lambda other: other)])
    assert tracers[0] is tracers[1]
    with pytest.raises(ZeroDivisionError):
        thread.call(lambda _: thread.call(lambda _: 1 // 0))
    thread.finish()


@pytest.mark.parametrize("name", ["put", "get"])
def test_an_interrupt_in_the_worst_instant_takes_nothing_away(name: str) -> None:
    """Python raises KeyboardInterrupt behind a call: also one that has had its effect."""
    thread = TracerThread()
    results: list[object] = []

    def interrupt(_frame: FrameType, event: str, what: object) -> None:
        """Do as a signal that comes while a method of a queue returns."""
        if event == "c_return" and getattr(what, "__name__", None) == name:
            sys.setprofile(None)
            raise KeyboardInterrupt

    def drive() -> None:
        sys.setprofile(interrupt)
        try:
            thread.call(lambda _: 1)
        except KeyboardInterrupt:
            results.append("interrupted")
        finally:
            sys.setprofile(None)
        results.append(thread.call(lambda _: 2))
        thread.finish()

    driver = threading.Thread(target=drive, daemon=True)
    driver.start()
    driver.join(_TIMEOUT_S)
    assert results == ["interrupted", 2]
