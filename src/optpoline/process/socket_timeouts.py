# SPDX-License-Identifier: Apache-2.0
"""Tell whether a thread that waits on a descriptor may wait for a limited time only.

A socket can have a timeout (SO_RCVTIMEO, socket(7)) that none of its calls' arguments shows.
A call that a stop has interrupted begins anew, and its timeout with it. So the socket itself
is asked, through a descriptor of ours for it (pidfd_getfd(2), Linux 5.6): we need the right
to trace its process for that, which who stops threads has.

The descriptor is ours for some microseconds. A thread that sleeps in a call on a socket holds
it open as well, so that nobody sees it live longer for that. Nothing is done to it but to ask:
not by ``socket.socket``, which may make what it is given non-blocking, for all who have it.
"""

from __future__ import annotations

import ctypes
import os
import socket

__all__ = ["may_time_out"]

_SYS_PIDFD_GETFD = 438
_TIMEVAL_SIZE = 16
"""Struct timeval: all zero means for ever."""

_libc = ctypes.CDLL(None, use_errno=True)


def may_time_out(pid: int, tid: int, fd: int) -> bool:
    """Tell whether who waits for data of a descriptor may do so for a limited time only.

    Args:
        pid: The thread's process.
        tid: The thread; it may have a table of descriptors of its own.
        fd: Its descriptor.

    Returns:
        False for what is no socket, and for a socket without a timeout; true for all others,
        and where it cannot be told.
    """
    try:
        name = os.readlink(f"/proc/{pid}/task/{tid}/fd/{fd}")
        if not name.startswith("socket:"):
            return False
        ours = _get_fd(pid, fd)
    except OSError:
        return True  # closed meanwhile, or a kernel, or a security module, that does not let us
    try:
        # Another one, where the thread has a table of its own.
        return os.readlink(f"/proc/self/fd/{ours}") != name or _has_timeout(ours)
    finally:
        os.close(ours)


def _get_fd(pid: int, fd: int) -> int:
    """Return a descriptor of ours for what a process has open.

    Raises:
        OSError: if we get none.
    """
    pidfd = os.pidfd_open(pid)
    try:
        ours = int(_libc.syscall(_SYS_PIDFD_GETFD, pidfd, fd, 0))
        if ours < 0:
            raise OSError(ctypes.get_errno(), "pidfd_getfd")
        return ours
    finally:
        os.close(pidfd)


def _has_timeout(fd: int) -> bool:
    """Tell whether a socket has a timeout for what receives, or cannot be asked."""
    timeval = ctypes.create_string_buffer(_TIMEVAL_SIZE)
    size = ctypes.c_uint32(_TIMEVAL_SIZE)
    refused = _libc.getsockopt(
        fd, socket.SOL_SOCKET, socket.SO_RCVTIMEO, timeval, ctypes.byref(size)
    )
    return bool(refused) or any(timeval.raw)
