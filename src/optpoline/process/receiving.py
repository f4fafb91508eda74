# SPDX-License-Identifier: Apache-2.0
"""What a thread would notice that is woken while it waits to receive from a file.

No argument of its call says it, but the file may: a socket can have a timeout (SO_RCVTIMEO),
which begins again with the call, or a number of bytes to wait for (SO_RCVLOWAT), less than
which is what an interrupted call answers with (socket(7)). A terminal can have both (VTIME and
VMIN, termios(3)).

They are asked through a descriptor of ours (pidfd_getfd(2), Linux 5.6): we need the right to
trace the process for that, which who stops threads has. The descriptor is ours for some
microseconds, in which the program cannot have the last one: what it closes then lives on for as
long. So each socket is asked once, and from a thread that nobody of normal priority takes the
CPU from, where we may have that; a terminal, whose modes change, each time. Nothing is done to
them but to ask: not by ``socket.socket``, which may make what it is given non-blocking, for all
who have it.
"""

from __future__ import annotations

import ctypes
import errno
import os
import socket
import termios
from collections import OrderedDict

from optpoline.process.priority import at_real_time
from optpoline.x86.syscalls import Disturbance

__all__ = ["is_socket", "rank_file", "rank_receiving"]

_SYS_PIDFD_GETFD = 438
_PIDFD_THREAD = os.O_EXCL  # include/uapi/linux/pidfd.h, since Linux 6.9
_TIMEVAL_SIZE = 16
"""Struct timeval: all zero means for ever."""

_MAX_KNOWN = 4096
"""Sockets whose answers are kept."""

_SOCKET = "socket:"
_TERMINALS = ("/dev/tty", "/dev/pts/", "/dev/console", "/dev/hvc", "/dev/pty")

_libc = ctypes.CDLL(None, use_errno=True)
_known: OrderedDict[str, Disturbance] = OrderedDict()


def is_socket(pid: int, tid: int, fd: int) -> bool:
    """Say whether a thread's descriptor is a socket; threads may have tables of their own."""
    try:
        return _name_of(pid, tid, fd).startswith(_SOCKET)
    except OSError:
        return False


def rank_file(pid: int, tid: int, fd: int) -> Disturbance:
    """Say what who waits for data of a descriptor might notice, by what sort of file it is.

    Args:
        pid: The thread's process.
        tid: The thread; it may have a table of descriptors of its own.
        fd: Its descriptor.

    Returns:
        ``SOCKET_TIMEOUT_AFRESH`` for a socket, a terminal, and where it cannot be told; ``NONE``
        for others: they answer with what there is as soon as there is anything.
    """
    try:
        name = _name_of(pid, tid, fd)
    except OSError:
        return Disturbance.SOCKET_TIMEOUT_AFRESH
    must_ask = name.startswith((_SOCKET, *_TERMINALS))
    return Disturbance.SOCKET_TIMEOUT_AFRESH if must_ask else Disturbance.NONE


def rank_receiving(pid: int, tid: int, fd: int) -> Disturbance:
    """Say what who waits for data of a descriptor would notice; the file is asked.

    Args:
        pid: The thread's process.
        tid: The thread.
        fd: Its descriptor.

    Returns:
        ``HARMFUL`` if a part of what is waited for may be answered, ``TIMEOUT_AFRESH`` if it has
        a timeout and where it cannot be told, ``NONE`` else.
    """
    try:
        name = _name_of(pid, tid, fd)
        if name.startswith(_TERMINALS):
            return _ask(pid, tid, fd, name)
        if not name.startswith(_SOCKET):
            return Disturbance.NONE
        if name not in _known:
            _known[name] = _ask(pid, tid, fd, name)
            while len(_known) > _MAX_KNOWN:
                _known.popitem(last=False)
        return _known[name]
    except OSError:
        # Closed meanwhile, or a kernel, or a security module, that does not let us.
        return Disturbance.TIMEOUT_AFRESH


def _name_of(pid: int, tid: int, fd: int) -> str:
    """Return what a thread has open under a number."""
    return os.readlink(f"/proc/{pid}/task/{tid}/fd/{fd}")


def _ask(pid: int, tid: int, fd: int, name: str) -> Disturbance:
    """Ask a socket or a terminal.

    Raises:
        OSError: if it cannot be had, or is another one by now.
    """
    with at_real_time():
        ours = _get_fd(pid, tid, fd)
        try:
            rank = _rank_socket(ours) if name.startswith(_SOCKET) else _rank_terminal(ours)
            # Another one, where the thread has a table of its own.
            is_same = os.readlink(f"/proc/self/fd/{ours}") == name
        finally:
            os.close(ours)
    if not is_same:
        raise OSError(errno.EBADF, "another file")
    return rank


def _get_fd(pid: int, tid: int, fd: int) -> int:
    """Return a descriptor of ours for what a thread has open.

    Raises:
        OSError: if we get none.
    """
    try:
        pidfd = os.pidfd_open(tid, _PIDFD_THREAD)
    except OSError:
        pidfd = os.pidfd_open(pid)
    try:
        ours = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
        if ours < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return ours
    finally:
        os.close(pidfd)


def _rank_socket(fd: int) -> Disturbance:
    """Rank what who receives from a socket of ours would notice.

    Raises:
        OSError: if it does not tell.
    """
    timeout = ctypes.create_string_buffer(_TIMEVAL_SIZE)
    least_size = ctypes.c_int(1)
    for option, value in ((socket.SO_RCVTIMEO, timeout), (socket.SO_RCVLOWAT, least_size)):
        size = ctypes.c_uint32(ctypes.sizeof(value))
        if _libc.getsockopt(fd, socket.SOL_SOCKET, option, ctypes.byref(value), ctypes.byref(size)):
            raise OSError(ctypes.get_errno(), "getsockopt")
    if least_size.value > 1:
        return Disturbance.HARMFUL
    return Disturbance.TIMEOUT_AFRESH if any(timeout.raw) else Disturbance.NONE


def _rank_terminal(fd: int) -> Disturbance:
    """Rank what who reads from a terminal of ours would notice.

    Raises:
        OSError: if it does not tell.
    """
    try:
        _, _, _, local_modes, _, _, characters = termios.tcgetattr(fd)
    except termios.error as error:
        raise OSError(*error.args) from error
    if local_modes & termios.ICANON:
        return Disturbance.NONE  # whole lines
    # Numbers, where input is not by lines.
    if characters[termios.VMIN] > 1:
        return Disturbance.HARMFUL
    return Disturbance.TIMEOUT_AFRESH if characters[termios.VTIME] else Disturbance.NONE
