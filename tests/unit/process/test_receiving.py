# SPDX-License-Identifier: Apache-2.0
"""What a thread that waits for data of a file would notice: sockets are asked, once."""

from __future__ import annotations

import os
import socket
import struct
import termios
import threading
from collections.abc import Iterator
from queue import SimpleQueue

import pytest

from optpoline.process import receiving
from optpoline.process.receiving import rank_file, rank_receiving
from optpoline.process.thread_state import read_thread_state
from optpoline.process.waking import rank_call
from optpoline.x86.syscalls import Disturbance

NONE, AFRESH, HARMFUL = Disturbance.NONE, Disturbance.TIMEOUT_AFRESH, Disturbance.HARMFUL
TIMEVAL = "ll"
SYS_RECVFROM = 45


@pytest.fixture(autouse=True)
def _nothing_known() -> Iterator[None]:
    """Ask every socket anew: the numbers of sockets come again."""
    receiving._known.clear()
    yield
    receiving._known.clear()


def ask(fd: int) -> Disturbance:
    """Ask about a descriptor of this process."""
    return rank_receiving(os.getpid(), threading.get_native_id(), fd)


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        (None, b"", NONE),
        (socket.SO_RCVTIMEO, struct.pack(TIMEVAL, 30, 0), AFRESH),
        (socket.SO_RCVTIMEO, struct.pack(TIMEVAL, 0, 20_000), AFRESH),
        (socket.SO_RCVTIMEO, struct.pack(TIMEVAL, 0, 0), NONE),
        (socket.SO_SNDTIMEO, struct.pack(TIMEVAL, 30, 0), NONE),
        (socket.SO_RCVLOWAT, struct.pack("i", 8), HARMFUL),
        (socket.SO_RCVLOWAT, struct.pack("i", 1), NONE),
    ],
)
def test_sockets(option: int | None, value: bytes, expected: Disturbance) -> None:
    for family in (socket.AF_UNIX, socket.AF_INET):
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            if option is not None:
                listener.setsockopt(socket.SOL_SOCKET, option, value)
            n_open = len(os.listdir("/proc/self/fd"))
            assert ask(listener.fileno()) is expected
            assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_socket_is_asked_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """While we have it the program cannot have closed it for good."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one:
        assert ask(one.fileno()) is NONE
        monkeypatch.setattr(receiving, "_get_fd", lambda *_: pytest.fail("it was asked again"))
        assert ask(one.fileno()) is NONE


def test_a_socket_is_left_as_it_is() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as blocking:
        # With that a socket object made of it would make it non-blocking.
        socket.setdefaulttimeout(1.0)
        try:
            assert ask(blocking.fileno()) is NONE
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(blocking.fileno())


def test_others() -> None:
    near, far = os.pipe()
    assert ask(near) is NONE
    os.close(near)
    os.close(far)
    # Closed meanwhile: what it was cannot be told.
    assert ask(near) is AFRESH
    assert rank_file(os.getpid(), threading.get_native_id(), near) is (
        Disturbance.SOCKET_TIMEOUT_AFRESH
    )


@pytest.mark.parametrize(
    ("is_canonical", "least", "tenths", "expected"),
    [
        (True, 8, 5, NONE),
        (False, 1, 0, NONE),
        (False, 0, 0, NONE),
        (False, 8, 0, HARMFUL),
        (False, 8, 5, HARMFUL),
        (False, 0, 5, AFRESH),
        (False, 1, 5, AFRESH),
    ],
)
def test_a_terminal_is_asked_for_its_modes(
    *, is_canonical: bool, least: int, tenths: int, expected: Disturbance
) -> None:
    controller, terminal = os.openpty()
    try:
        modes = termios.tcgetattr(terminal)
        modes[3] = modes[3] | termios.ICANON if is_canonical else modes[3] & ~termios.ICANON
        modes[6][termios.VMIN], modes[6][termios.VTIME] = least, tenths
        termios.tcsetattr(terminal, termios.TCSANOW, modes)
        assert ask(terminal) is expected
    finally:
        os.close(terminal)
        os.close(controller)


def test_thread_with_a_table_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the process has under that number is another socket."""
    with (
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as one,
        socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other,
    ):
        name = os.readlink(f"/proc/self/fd/{other.fileno()}")
        readlink = os.readlink
        monkeypatch.setattr(
            os, "readlink", lambda path: name if "/task/" in path else readlink(path)
        )
        assert ask(one.fileno()) is AFRESH
        assert ask(other.fileno()) is NONE


@pytest.mark.parametrize("seconds", [0, 30])
def test_thread_that_sleeps_in_recv(seconds: int) -> None:
    near, far = socket.socketpair()
    near.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, struct.pack(TIMEVAL, seconds, 0))
    tids: SimpleQueue[int] = SimpleQueue()

    def receive() -> None:
        tids.put(threading.get_native_id())
        near.recv(1)

    thread = threading.Thread(target=receive)
    thread.start()
    try:
        tid = tids.get()
        while (state := read_thread_state(os.getpid(), tid)).syscall_nr != SYS_RECVFROM:
            os.sched_yield()
        assert rank_call(os.getpid(), state, asks=True) is (AFRESH if seconds else NONE)
    finally:
        far.send(b"x")
        thread.join()
        near.close()
        far.close()
