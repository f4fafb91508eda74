# SPDX-License-Identifier: Apache-2.0
"""Finding forked children that map a file: real processes, and a memfd of ours."""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from optpoline.process import births, mappers, procfs
from optpoline.process.kinship import now_ticks
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
    monkeypatch.setattr(births, "count_forks", lambda: 7)
    finder.find(inodes_of(file))

    def refuse(_path: str) -> list[str]:
        raise AssertionError("nobody new can be there")

    monkeypatch.setattr(os, "listdir", refuse)
    assert finder.find(inodes_of(file)) == ()


def test_child_that_exits_or_runs_another_program_drops_out_without_a_fork(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(births, "count_forks", lambda: 7)
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
    numbers = iter(range(100_000))
    monkeypatch.setattr(births, "count_forks", lambda: next(numbers))
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
            assert not finder.is_complete  # somebody is forked all the time
        assert seen.count(child) == 1


# --- those that come and go behind our back


def test_grandchild_forked_behind_the_listing_is_found(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its parent was listed, but has forked it and exited before it was looked at."""
    finder = MapperFinder(NO_PID, PATH)
    go, wait = os.pipe2(os.O_CLOEXEC)[::-1]
    told, tell = os.pipe2(os.O_CLOEXEC)
    grandchildren: list[int] = []

    def fork_and_exit() -> None:
        """Run in the child."""
        os.read(wait, 1)
        pid = os.fork()
        if pid:
            os.write(tell, b"%d\n" % pid)
            os._exit(0)
        while True:
            signal.pause()

    list_all = os.listdir

    def list_and_let_go(path: str) -> list[str]:
        """List, and let the child fork and exit behind that, the first time."""
        names = list_all(path)
        if path == "/proc" and not grandchildren:
            os.write(go, b"x")
            os.waitpid(child, 0)
            grandchildren.append(int(os.read(told, 20)))
        return names

    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        child = os.fork()
        if child == 0:
            try:
                fork_and_exit()
            finally:
                os._exit(1)
        monkeypatch.setattr(os, "listdir", list_and_let_go)
        try:
            assert finder.find(inodes_of(file)) == tuple(grandchildren)
            assert len(grandchildren) == 1
        finally:
            for pid in grandchildren:
                os.kill(pid, signal.SIGKILL)
            for fd in (go, wait, told, tell):
                os.close(fd)


def test_a_number_that_another_has_by_now_is_looked_at_anew(
    file: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is known of a process holds for it alone."""
    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ), fork_child(do_nothing) as child:
        numbers = iter(range(100_000))
        monkeypatch.setattr(births, "count_forks", lambda: next(numbers) // 1000)
        monkeypatch.setattr(mappers, "read_start_time", lambda _pid: 1)
        monkeypatch.setattr(mappers, "read_maps", lambda _pid: ())
        finder = MapperFinder(NO_PID, PATH)
        assert finder.find(inodes_of(file)) == ()
        monkeypatch.undo()
        monkeypatch.setattr(births, "_MAX_AGE_S", 0.0)
        assert finder.find(inodes_of(file)) == (child,)
        assert finder.start_times == {child: procfs.read_start_time(child)}
        finder.acquit(child)
        assert finder.find(inodes_of(file)) == ()


# --- those that may not be read

USER = 61234
"""Nobody else's."""


def _set_dumpable(is_dumpable: bool) -> None:
    """Say whether our own user may read our memory."""
    libc = ctypes.CDLL(None)
    assert libc.prctl(4, int(is_dumpable), 0, 0, 0) == 0  # PR_SET_DUMPABLE


def _as_user(act: Callable[[], str]) -> str:
    """Run a function as a user without rights, in a child; return what it says."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            os.setgroups([])
            os.setresgid(USER, USER, USER)
            os.setresuid(USER, USER, USER)
            _set_dumpable(True)
            os.write(tell, act().encode())
            os._exit(0)
        finally:
            os._exit(1)
    os.close(tell)
    with os.fdopen(told) as file:
        said = file.read()
    assert os.waitpid(pid, 0)[1] == 0
    return said


def _fork_hidden(*, is_orphan: bool) -> int:
    """Fork a child that may not be read and lives a while; return its number."""
    told, tell = os.pipe2(os.O_CLOEXEC)
    pid = os.fork()
    if pid == 0:
        try:
            if is_orphan and os.fork():
                os._exit(0)
            _set_dumpable(False)
            os.write(tell, b"%d" % os.getpid())
            time.sleep(60)
        finally:
            os._exit(1)
    if is_orphan:
        os.waitpid(pid, 0)
    child = int(os.read(told, 20))
    os.close(told)
    os.close(tell)
    return child


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes CAP_SETUID")
@pytest.mark.parametrize("is_orphan", [False, True])
def test_unreadable_child_is_told_though_it_be_an_orphan(file: int, is_orphan: bool) -> None:
    def look() -> str:
        """Look for our own children: we are the program and the controller."""
        finder = MapperFinder(os.getpid(), PATH, since=now_ticks())
        before = finder.find(inodes_of(file)), finder.unreadable
        child = _fork_hidden(is_orphan=is_orphan)
        try:
            finder.find(inodes_of(file))
            during = finder.unreadable
        finally:
            os.kill(child, signal.SIGKILL)
            if not is_orphan:
                os.waitpid(child, 0)
        while finder.unreadable:
            finder.find(inodes_of(file))
        # Nobody else's processes count, though we may read none of those.
        return repr((before, during == (child,)))

    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        assert _as_user(look) == repr((((), ()), True))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes CAP_SETUID")
def test_unreadable_process_that_is_older_or_a_stranger_s_does_not_count(file: int) -> None:
    def look() -> str:
        """Look for a child of ours that is older than what it is looked for, and others."""
        child = _fork_hidden(is_orphan=True)
        finder = MapperFinder(os.getpid(), PATH, since=procfs.read_start_time(child) + 1)
        try:
            return repr((finder.find(inodes_of(file)), finder.unreadable))
        finally:
            os.kill(child, signal.SIGKILL)

    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ), fork_child(do_nothing):
        # The child of this test is root's and young, and its parent is ours.
        assert _as_user(look) == repr(((), ()))


@pytest.mark.skipif(os.geteuid() != 0, reason="becoming another user takes CAP_SETUID")
def test_mapper_that_hides_stays_one(file: int) -> None:
    def look() -> str:
        """Find a child, which then hides."""
        go, wait = os.pipe2(os.O_CLOEXEC)[::-1]
        told, tell = os.pipe2(os.O_CLOEXEC)
        finder = MapperFinder(os.getpid(), PATH, since=now_ticks())
        child = os.fork()
        if child == 0:
            os.read(wait, 1)
            _set_dumpable(False)
            os.write(tell, b"x")
            time.sleep(60)
            os._exit(1)
        try:
            before = finder.find(inodes_of(file)) == (child,)
            os.write(go, b"x")
            os.read(told, 1)
            return repr((before, finder.find(inodes_of(file)) == (child,), finder.unreadable))
        finally:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)

    with mmap.mmap(file, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        assert _as_user(look) == repr((True, True, ()))
