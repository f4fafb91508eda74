# SPDX-License-Identifier: Apache-2.0
"""Which descriptors a thread may wait on for a limited time: asked of our own."""

from __future__ import annotations

import os
import socket
import struct
import threading
from queue import SimpleQueue

import pytest

from optpoline.process.socket_timeouts import may_time_out
from optpoline.process.thread_state import read_thread_state
from optpoline.process.waking import may_wait_afresh

TIMEVAL = "ll"
SYS_RECVFROM = 45


def ask(fd: int) -> bool:
    """Ask about a descriptor of this process."""
    return may_time_out(os.getpid(), threading.get_native_id(), fd)


@pytest.mark.parametrize(
    ("option", "seconds", "expected"),
    [
        (None, (0, 0), False),
        (socket.SO_RCVTIMEO, (30, 0), True),
        (socket.SO_RCVTIMEO, (0, 20_000), True),
        (socket.SO_RCVTIMEO, (0, 0), False),
        (socket.SO_SNDTIMEO, (30, 0), False),
    ],
)
def test_sockets(option: int | None, seconds: tuple[int, int], expected: bool) -> None:
    for family in (socket.AF_UNIX, socket.AF_INET):
        with socket.socket(family, socket.SOCK_STREAM) as listener:
            if option is not None:
                listener.setsockopt(socket.SOL_SOCKET, option, struct.pack(TIMEVAL, *seconds))
            n_open = len(os.listdir("/proc/self/fd"))
            assert ask(listener.fileno()) is expected
            assert len(os.listdir("/proc/self/fd")) == n_open


def test_a_socket_is_left_as_it_is() -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as blocking:
        # With that a socket object made of it would make it non-blocking.
        socket.setdefaulttimeout(1.0)
        try:
            assert ask(blocking.fileno()) is False
        finally:
            socket.setdefaulttimeout(None)
        assert os.get_blocking(blocking.fileno())


def test_others() -> None:
    near, far = os.pipe()
    assert ask(near) is False
    os.close(near)
    os.close(far)
    # Closed meanwhile: what it was cannot be told.
    assert ask(near) is True


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
        assert ask(one.fileno()) is True
        assert ask(other.fileno()) is False


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
        assert may_wait_afresh(os.getpid(), state) is bool(seconds)
    finally:
        far.send(b"x")
        thread.join()
        near.close()
        far.close()
