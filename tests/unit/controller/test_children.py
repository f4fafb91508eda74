# SPDX-License-Identifier: Apache-2.0
"""Whose text is read, and that nobody's is missed: real children of ours that map a memfd.

We are the program; its text is a buffer of ours, and each child has its own copy of that.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller import children as children_module
from optpoline.controller.children import Children
from optpoline.controller.target import Target
from optpoline.model import Addr
from optpoline.patch.layout import ARENA_NAME, JournalEntry
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_start_time

SIZE = mmap.PAGESIZE
BASELINE = bytes.fromhex("e8 00 00 00 00")


@pytest.fixture
def text() -> ctypes.Array[ctypes.c_char]:
    """Return a site."""
    return ctypes.create_string_buffer(BASELINE, len(BASELINE))


@pytest.fixture
def children() -> Iterator[Children]:
    """Return the children of a program that has mapped an arena, which is us."""
    fd = os.memfd_create(ARENA_NAME, os.MFD_CLOEXEC)
    os.ftruncate(fd, SIZE)
    target = SimpleNamespace(
        pid=os.getpid(),
        arenas=[SimpleNamespace(inode=os.fstat(fd).st_ino)],
        stop_timeout_ns=10**9,
    )
    found = Children(cast(Target, target), follow=False)
    with mmap.mmap(fd, SIZE, mmap.MAP_SHARED, mmap.PROT_READ):
        os.close(fd)
        yield found
    found.close()


def _entry(text: ctypes.Array[ctypes.c_char]) -> JournalEntry:
    """Return what is journalled of the site."""
    return JournalEntry(addr=Addr(ctypes.addressof(text)), code=BASELINE, disp_off=1)


def _lead_by(text: ctypes.Array[ctypes.c_char], disp: int) -> Addr:
    """Make the site lead somewhere; return where."""
    text.raw = BASELINE[:1] + disp.to_bytes(4, "little")
    return Addr(ctypes.addressof(text) + len(BASELINE) + disp)


def _fork(act: Callable[[], object]) -> int:
    """Fork a child that does something and then sleeps."""
    pid = os.fork()
    if pid == 0:
        try:
            act()
            while True:
                signal.pause()
        finally:
            os._exit(1)
    return pid


def _end(pid: int) -> None:
    """Kill a child of ours."""
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_text_is_that_of_the_moment_of_the_fork(
    children: Children, text: ctypes.Array[ctypes.c_char]
) -> None:
    assert children.led_to([_entry(text)]) == frozenset()
    first = _lead_by(text, 0x1000)
    one = _fork(lambda: None)
    second = _lead_by(text, 0x2000)
    other = _fork(lambda: None)
    _lead_by(text, 0x3000)
    try:
        assert children.led_to([_entry(text)]) == {first, second}
        assert {space.pid for space in children.find()} == {one, other}
    finally:
        _end(one)
        _end(other)
    assert children.led_to([_entry(text)]) == frozenset()
    assert children.n_seen == 2


def test_text_that_a_child_hands_on_before_it_is_read_is_read(
    children: Children, text: ctypes.Array[ctypes.c_char], monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has been found; then it forks another, and exits."""
    led = _lead_by(text, 0x1000)
    go, wait = os.pipe2(os.O_CLOEXEC)[::-1]
    told, tell = os.pipe2(os.O_CLOEXEC)

    def hand_on() -> None:
        """Fork another when told to."""
        os.read(wait, 1)
        pid = _fork(lambda: None)
        os.write(tell, b"%d\n" % pid)
        os._exit(0)

    heirs: list[int] = []
    read_text = children_module.led_to

    def let_go_and_read(memory: RemoteMemory, entries: Sequence[JournalEntry]) -> set[Addr]:
        """Read a text, the first time that of a child that is gone by then."""
        if not heirs:
            os.write(go, b"x")
            heirs.append(int(os.read(told, 20)))
            os.waitpid(child, 0)
        return read_text(memory, entries)

    monkeypatch.setattr(children_module, "led_to", let_go_and_read)
    child = _fork(hand_on)
    try:
        assert children.led_to([_entry(text)]) == {led}
        assert [space.pid for space in children.find()] == heirs
    finally:
        for pid in heirs:
            os.kill(pid, signal.SIGKILL)
        for fd in (go, wait, told, tell):
            os.close(fd)


class _Finder:
    """Finds what it is told."""

    is_complete = is_current = True
    unreadable = ()

    def __init__(self) -> None:
        """Begin with nobody."""
        self.start_times: dict[int, int] = {}

    def find(self, inodes: frozenset[int]) -> tuple[int, ...]:
        """Return them."""
        return tuple(self.start_times)


def test_a_number_that_another_child_has_by_now_is_another_child(
    children: Children, text: ctypes.Array[ctypes.c_char], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the one before is no more, and is not taken for its own."""
    finder = _Finder()
    monkeypatch.setattr(children, "_finder", finder)
    led = _lead_by(text, 0x1000)
    child = _fork(lambda: None)
    try:
        start = read_start_time(child)
        finder.start_times = {child: start - 1}
        assert children.find() == ()  # gone since it was found
        finder.start_times = {child: start}
        (space,) = children.find()
        assert children.find() == (space,)
        monkeypatch.setattr(children_module, "read_start_time", lambda _: start + 1)
        finder.start_times = {child: start + 1}
        (other,) = children.find()
        assert other is not space
        assert children.led_to([_entry(text)]) == {led}
    finally:
        _end(child)
