# SPDX-License-Identifier: Apache-2.0
"""Finding forked children that map a file: real processes, and a memfd of ours."""

from __future__ import annotations

import mmap
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from optpoline.process import mappers, procfs
from optpoline.process.mappers import MapperFinder

NAME = "optpoline-test"
PATH = f"/memfd:{NAME} (deleted)"
SIZE = 4 * mmap.PAGESIZE
NO_PID = 0
"""Of the process that is not looked for: none, as ours is never reported either."""


@pytest.fixture
def file() -> Iterator[int]:
    """Return a memfd."""
    fd = os.memfd_create(NAME, os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    yield fd
    os.close(fd)


@contextmanager
def fork_child(act: Callable[[int], object]) -> Iterator[int]:
    """Fork a child that does something, tells so, and sleeps until it is killed.

    ``act`` gets the descriptor to tell it with, by writing or by an exec that closes it.
    """
    ready, told = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.close(ready)
            act(told)
            os.close(told)
            while True:
                signal.pause()
        finally:
            os._exit(1)
    try:
        os.close(told)
        assert os.read(ready, 1) == b""
        os.close(ready)
        yield pid
    finally:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)


def inodes_of(fd: int) -> frozenset[int]:
    """Return what names the file."""
    return frozenset([os.fstat(fd).st_ino])


def do_nothing(_told: int) -> None:
    """Only be forked."""


def sleep_in_another_program(_told: int) -> None:
    """Run another program, which maps nothing of ours and closes the pipe."""
    os.execv("/bin/sleep", ["sleep", "1000"])


def test_forked_child_is_found_and_one_that_ran_another_program_is_not(file: int) -> None:
    finder = MapperFinder(NO_PID, PATH)
    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        assert finder.find(inodes_of(file)) == ()
        with fork_child(do_nothing) as child, fork_child(sleep_in_another_program) as other:
            found = finder.find(inodes_of(file))
            assert child in found
            assert other not in found
            # Looked for again: by what is known, and anew.
            assert finder.find(inodes_of(file)) == found
            with fork_child(do_nothing) as second:
                assert set(finder.find(inodes_of(file))) == {*found, second}
        assert finder.find(inodes_of(file)) == ()


def test_child_that_is_not_mapping_it_is_not_found(file: int) -> None:
    with fork_child(do_nothing):
        assert MapperFinder(NO_PID, PATH).find(inodes_of(file)) == ()


def test_only_the_wanted_file_counts(file: int) -> None:
    other = os.memfd_create(NAME, os.MFD_CLOEXEC)
    os.ftruncate(other, SIZE)
    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ), fork_child(do_nothing) as child:
        assert MapperFinder(NO_PID, PATH).find(inodes_of(other)) == ()
        assert MapperFinder(NO_PID, "/memfd:other (deleted)").find(inodes_of(file)) == ()
        assert MapperFinder(NO_PID, PATH).find(inodes_of(file)) == (child,)
        assert MapperFinder(child, PATH).find(inodes_of(file)) == ()
    os.close(other)


@pytest.mark.parametrize(("off", "is_found"), [(0, False), (mmap.PAGESIZE, True)])
def test_whole_writable_mapping_is_a_controllers(file: int, off: int, is_found: bool) -> None:
    # A program has the counters writable, and they are not at the start.
    with (
        mmap.mmap(file, SIZE - off, mmap.MAP_SHARED, mmap.PROT_READ | mmap.PROT_WRITE, offset=off),
        fork_child(do_nothing) as child,
    ):
        assert MapperFinder(NO_PID, PATH).find(inodes_of(file)) == ((child,) if is_found else ())


def test_nobody_is_looked_at_while_nothing_was_forked(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    finder = MapperFinder(NO_PID, PATH)
    monkeypatch.setattr(mappers, "_count_forks", lambda: 7)
    finder.find(inodes_of(file))

    def refuse(_path: str) -> list[str]:
        raise AssertionError("nobody new can be there")

    monkeypatch.setattr(os, "listdir", refuse)
    assert finder.find(inodes_of(file)) == ()


def test_child_that_exits_or_runs_another_program_drops_out_without_a_fork(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mappers, "_count_forks", lambda: 7)
    finder = MapperFinder(NO_PID, PATH)
    go, wait = os.pipe2(os.O_CLOEXEC)[::-1]
    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        ready, told = os.pipe2(os.O_CLOEXEC)
        pid = os.fork()
        if pid == 0:
            os.read(wait, 1)
            os.execv("/bin/sleep", ["sleep", "1000"])
        try:
            os.close(told)
            assert finder.find(inodes_of(file)) == (pid,)
            os.write(go, b"x")
            os.read(ready, 1)  # closed by the exec
            assert finder.find(inodes_of(file)) == ()
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            for fd in (ready, go, wait):
                os.close(fd)


def test_innocent_process_is_looked_at_once(file: int, monkeypatch: pytest.MonkeyPatch) -> None:
    numbers = iter(range(100))
    monkeypatch.setattr(mappers, "_count_forks", lambda: next(numbers))
    seen: list[int] = []
    original = procfs.read_maps

    def spy(pid: int) -> object:
        seen.append(pid)
        return original(pid)

    with fork_child(do_nothing) as child:
        monkeypatch.setattr(mappers, "read_maps", spy)
        finder = MapperFinder(NO_PID, PATH)
        for _ in range(3):
            assert finder.find(inodes_of(file)) == ()
        assert seen.count(child) == 1
