# SPDX-License-Identifier: Apache-2.0
"""Who is not in our address space; who is in one takes a program that clones itself."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from collections.abc import Iterator

import pytest

from optpoline.errors import ProcessGone, Unsettled
from optpoline.process import births, sharers
from optpoline.process.procfs import read_layout
from optpoline.process.sharers import SharerFinder, find_sharers, has_same_memory


@pytest.fixture
def child() -> Iterator[int]:
    """Fork a child that sleeps until the end, and has memory of its own."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                signal.pause()
        finally:
            os._exit(1)
    yield pid
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_a_forked_child_looks_the_same_and_is_not(child: int) -> None:
    assert read_layout(child) == read_layout(os.getpid())
    assert not has_same_memory(os.getpid(), child)
    assert find_sharers(os.getpid()) == ()


def test_without_kcmp_a_forked_child_counts_while_it_has_the_same_map(
    child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sharers, "_libc", _Lacking())
    monkeypatch.setattr(ctypes, "get_errno", lambda: errno.ENOSYS)
    monkeypatch.setattr(sharers, "read_maps", lambda pid: pid in (os.getpid(), child))
    assert find_sharers(os.getpid()) == (child,)
    monkeypatch.setattr(sharers, "read_maps", lambda pid: pid)
    assert find_sharers(os.getpid()) == ()


class _Lacking:
    """A kernel without kcmp."""

    def syscall(self, *_args: int) -> int:
        """Fail."""
        return -1


def test_a_dead_process_shares_no_memory_with_threads_of_the_kernel() -> None:
    """None of these has any."""
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    try:
        with pytest.raises(ProcessGone):
            SharerFinder(pid).look()
    finally:
        os.waitpid(pid, 0)
    with pytest.raises(ProcessGone):
        find_sharers(pid)


def test_those_who_come_too_fast_are_not_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100_000))
    monkeypatch.setattr(births, "count_forks", lambda: next(numbers))
    with pytest.raises(Unsettled):
        find_sharers(os.getpid())


def test_a_program_that_starts_threads_all_the_time_is_looked_at_till_it_pauses(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    numbers = iter(range(800))
    monkeypatch.setattr(births, "count_forks", lambda: next(numbers, 800))
    assert find_sharers(os.getpid()) == ()


def test_who_was_not_asked_because_of_an_error_is_asked_later(
    child: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = SharerFinder(os.getpid())
    monkeypatch.setattr(sharers, "has_same_memory", _fail)
    with pytest.raises(OSError, match="kcmp"):
        finder.look()
    monkeypatch.setattr(sharers, "has_same_memory", lambda _pid, other: other == child)
    assert finder.look() == (child,)


def _fail(_pid: int, _other: int) -> bool:
    """Fail as a kernel would."""
    raise OSError("kcmp")
