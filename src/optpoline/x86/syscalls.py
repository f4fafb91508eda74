# SPDX-License-Identifier: Apache-2.0
"""What being interrupted does to each x86-64 system call.

A thread that is stopped while it sleeps in the kernel comes out of its system
call. Most calls are restarted by the kernel and the program cannot tell;
some answer EINTR, some cut a transfer short, some run under a temporary signal
mask. These tables say which, so that the stop can choose whom to disturb and
put right what it disturbed. Numbers: arch/x86/entry/syscalls/syscall_64.tbl.
"""

from __future__ import annotations

from enum import IntEnum

from optpoline.x86.registers import Registers

__all__ = [
    "ERESTARTNOHAND",
    "ERESTARTNOINTR",
    "ERESTARTSYS",
    "ERESTART_RESTARTBLOCK",
    "SYS_CLOSE",
    "SYS_GETPID",
    "SYS_MEMFD_CREATE",
    "SYS_MMAP",
    "SYS_MPROTECT",
    "SYS_MUNMAP",
    "SYS_RT_SIGRETURN",
    "Disturbance",
    "begin_again",
    "has_temporary_mask",
    "is_restartable_eintr",
    "may_receive",
    "rank_disturbance",
    "undisturbed",
]

ERESTARTSYS = 512
ERESTARTNOINTR = 513
ERESTARTNOHAND = 514
ERESTART_RESTARTBLOCK = 516
_EINTR = 4
# include/linux/errno.h: never seen by programs, only by a tracer.

SYS_MMAP = 9
SYS_MPROTECT = 10
SYS_MUNMAP = 11
SYS_RT_SIGRETURN = 15
SYS_GETPID = 39
SYS_CLOSE = 3
SYS_MEMFD_CREATE = 319

_READ, _WRITE, _OPEN, _POLL = 0, 1, 2, 7
_READV, _WRITEV, _SELECT, _PAUSE, _NANOSLEEP = 19, 20, 23, 34, 35
_CONNECT, _ACCEPT, _SENDTO, _RECVFROM, _SENDMSG, _RECVMSG = 42, 43, 44, 45, 46, 47
_WAIT4, _SEMOP, _MSGSND, _MSGRCV, _FCNTL, _FLOCK = 61, 65, 69, 70, 72, 73
_RT_SIGTIMEDWAIT, _RT_SIGSUSPEND, _FUTEX, _IO_GETEVENTS = 128, 130, 202, 208
_RESTART_SYSCALL, _SEMTIMEDOP, _CLOCK_NANOSLEEP, _EPOLL_WAIT = 219, 220, 230, 232
_MQ_TIMEDSEND, _MQ_TIMEDRECEIVE, _WAITID, _OPENAT = 242, 243, 247, 257
_PSELECT6, _PPOLL, _EPOLL_PWAIT, _ACCEPT4, _RECVMMSG = 270, 271, 281, 288, 299
_IO_PGETEVENTS, _IO_URING_ENTER, _EPOLL_PWAIT2 = 333, 426, 441

_MSG_WAITALL = 0x100
_NEGATIVE = 1 << 31  # of a 32-bit argument
_TIMER_ABSTIME = 1
_F_SETLKW, _F_OFD_SETLKW = 7, 38
_FUTEX_COMMAND_MASK = 0x7F
_FUTEX_WAITS = frozenset({0, 6, 9, 11, 13})  # WAIT, LOCK_PI, WAIT_BITSET, WAIT_REQUEUE_PI, LOCK_PI2

_EINTR_ALWAYS = frozenset(
    {
        _EPOLL_WAIT, _EPOLL_PWAIT, _EPOLL_PWAIT2, _SEMOP, _SEMTIMEDOP, _RT_SIGTIMEDWAIT,
        _IO_GETEVENTS, _IO_PGETEVENTS, _IO_URING_ENTER,
    }
)  # fmt: skip
"""Calls that answer EINTR to any stop and have done nothing then; waiting again is safe."""

_EINTR_ON_SOCKET_TIMEOUT = frozenset(
    {_CONNECT, _ACCEPT, _ACCEPT4, _SENDTO, _RECVFROM, _SENDMSG, _RECVMSG, _RECVMMSG}
)
"""Socket calls: EINTR with SO_RCVTIMEO or SO_SNDTIMEO, else ERESTARTSYS (sock_intr_errno)."""

_READ_WRITE = frozenset({_READ, _WRITE, _READV, _WRITEV})
"""The same on a socket; on another file EINTR can have any meaning, so it is left alone."""

_TEMPORARY_MASK = frozenset({_RT_SIGSUSPEND, _RT_SIGTIMEDWAIT, _IO_PGETEVENTS})
_MASK_ARGUMENT = {_PPOLL: 3, _PSELECT6: 5, _EPOLL_PWAIT: 4, _EPOLL_PWAIT2: 4, _IO_URING_ENTER: 4}
"""Which argument points to a mask, where there may be none: select() is a pselect6 without one
(glibc since 2.34), and language run-times wait in an epoll_pwait without one."""

_ENTER_EXT_ARGS = 1 << 3 | 1 << 6
"""IORING_ENTER_EXT_ARG and IORING_ENTER_EXT_ARG_REG (Linux 5.11, 6.13): what io_uring_enter is
given may have a mask, or a timeout, or both, in memory or in a region that the kernel knows."""


_RESTARTED = frozenset(
    {
        _READ, _READV, _WAIT4, _WAITID, _PAUSE, _SELECT, _MSGSND, _MSGRCV, _FLOCK, _OPEN, _OPENAT,
        _MQ_TIMEDSEND, _MQ_TIMEDRECEIVE, _SEMOP, _PPOLL, _PSELECT6,
    }
)  # fmt: skip
"""The kernel writes what is left of a timeout of select, pselect6 and ppoll back before."""

_RESTARTED_AFRESH = frozenset(
    {_EPOLL_WAIT, _EPOLL_PWAIT, _EPOLL_PWAIT2, _SEMTIMEDOP, _IO_GETEVENTS}
)
_RECEIVES = frozenset({_ACCEPT, _ACCEPT4, _RECVFROM, _RECVMSG})

_RESTART_BLOCK = frozenset({_NANOSLEEP, _POLL, _RESTART_SYSCALL})


class Disturbance(IntEnum):
    """How much a sleeping thread notices of being woken; less is better."""

    NONE = 0
    """The kernel restarts the call; nothing is lost."""
    SOCKET_TIMEOUT_AFRESH = 1
    """It is restarted; if its socket has a timeout, which few have, that begins again. Its file
    has to be asked to know (``process/receiving.py``)."""
    TIMEOUT_AFRESH = 2
    """It is restarted, and a relative timeout begins again."""
    RESTART_BLOCK = 3
    """It is restarted through a restart block, which a signal frame would cancel."""
    HARMFUL = 4
    """A transfer may be cut short, a temporary signal mask lost: never wake it."""


def rank_disturbance(nr: int, args: tuple[int, ...]) -> Disturbance:
    """Say what waking a thread asleep in this call would do to it.

    Args:
        nr: Number of the system call, -1 when asleep outside any (a page fault).
        args: Its six arguments.

    >>> rank_disturbance(35, (0, 0, 0, 0, 0, 0)).name
    'RESTART_BLOCK'
    """
    if (nr == _RECVFROM and args[3] & _MSG_WAITALL) or (nr == _RECVMSG and args[2] & _MSG_WAITALL):
        return Disturbance.HARMFUL
    if has_temporary_mask(nr, args):
        return Disturbance.HARMFUL
    if nr == _IO_URING_ENTER:
        # Interrupted, it answers with what it has submitted, or with fewer completions.
        waits_for_first = not args[1] and args[2] == 1
        return Disturbance.NONE if waits_for_first else Disturbance.HARMFUL
    if nr in (_EPOLL_WAIT, _EPOLL_PWAIT) and args[3] & _NEGATIVE:
        return Disturbance.NONE  # no timeout
    if nr == _EPOLL_PWAIT2 and not args[3]:
        return Disturbance.NONE  # likewise
    if nr == _FUTEX and args[1] & _FUTEX_COMMAND_MASK in _FUTEX_WAITS:
        return Disturbance.RESTART_BLOCK if args[3] else Disturbance.NONE
    if nr == _CLOCK_NANOSLEEP:
        return Disturbance.NONE if args[1] & _TIMER_ABSTIME else Disturbance.RESTART_BLOCK
    if nr == _FCNTL:
        waits = args[1] in (_F_SETLKW, _F_OFD_SETLKW)
        return Disturbance.NONE if waits else Disturbance.HARMFUL
    if nr in _RESTARTED:
        return Disturbance.NONE
    if nr in _RECEIVES:
        return Disturbance.SOCKET_TIMEOUT_AFRESH
    if nr in _RESTARTED_AFRESH:
        return Disturbance.TIMEOUT_AFRESH
    if nr in _RESTART_BLOCK:
        return Disturbance.RESTART_BLOCK
    return Disturbance.HARMFUL


def has_temporary_mask(nr: int, args: tuple[int, ...]) -> bool:
    """Say whether a call may run under a signal mask of its own.

    >>> has_temporary_mask(271, (0x1000, 1, 0, 0x2000, 8, 0))  # ppoll
    True
    >>> has_temporary_mask(271, (0x1000, 1, 0, 0, 8, 0))
    False
    """
    if nr == _IO_URING_ENTER and args[3] & _ENTER_EXT_ARGS:
        return True
    if nr in _MASK_ARGUMENT:
        return bool(args[_MASK_ARGUMENT[nr]])
    return nr in _TEMPORARY_MASK


def may_receive(nr: int) -> bool:
    """Say whether a call that is restarted receives from its first argument.

    What that is says whether it answers with a part of what it waits for when it is interrupted.

    >>> may_receive(0), may_receive(43), may_receive(1)  # read, accept, write
    (True, True, False)
    """
    return nr in _RECEIVES or nr in (_READ, _READV)


def begin_again(regs: Registers) -> Registers:
    """Return registers with which a call that has a restart block begins again instead.

    A restart block is gone back to by a system call of its own, ``restart_syscall``, which a
    seccomp filter may answer with death. Its timeout begins again as well.
    """
    has_block = regs.in_syscall and regs.result == -ERESTART_RESTARTBLOCK
    # One that has gone back once was let through.
    if has_block and regs.orig_rax != _RESTART_SYSCALL:
        return regs.with_result(-ERESTARTNOHAND)
    return regs


def is_restartable_eintr(regs: Registers, *, is_socket: bool) -> bool:
    """Say whether a stopped thread's EINTR came from the stop and can be undone.

    Args:
        regs: Registers at the stop.
        is_socket: Whether the call's first argument is a socket; only asked
            about for read and write.
    """
    if not regs.in_syscall or regs.result != -_EINTR:
        return False
    nr = regs.orig_rax
    return (
        nr in _EINTR_ALWAYS or nr in _EINTR_ON_SOCKET_TIMEOUT or (is_socket and nr in _READ_WRITE)
    )


def undisturbed(regs: Registers) -> Registers:
    """Return registers with which a thread that runs on starts its call again.

    This is what the kernel does for a call that is to be restarted, as far as a
    signal frame can say it: a frame cannot hold a pending restart. A restart
    block cannot be kept, so such a call answers EINTR.
    """
    if regs.in_syscall:
        if regs.result in (-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND):
            # `syscall` is two bytes long.
            return regs._replace(rax=regs.orig_rax, rip=regs.rip - 2)
        if regs.result == -ERESTART_RESTARTBLOCK:
            return regs.with_result(-_EINTR)
    return regs
