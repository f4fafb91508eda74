# SPDX-License-Identifier: Apache-2.0
"""The clock event of one thread.

A thin layer over perf_event_open(2), for one use: a software clock that ticks
while a thread runs and notes where it is in user code. The kernel's timer does
the work, so it needs no performance counter and runs on virtual machines. The
thread is not stopped and cannot tell. With each place come, if wanted, the first
words of its stack: what is called from where says more than the place alone.
They arrive in a ring (``process/perf_ring.py``).

Constants: include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from pathlib import Path

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone, UnsupportedTarget
from optpoline.process.perf_ring import WORD_SIZE, RingRecords, SampleRing, StackSample

__all__ = ["MAX_STACK_WORDS", "ThreadClock"]

_SYS_PERF_EVENT_OPEN = 298  # arch/x86/entry/syscalls/syscall_64.tbl
_PERF_FLAG_FD_CLOEXEC = 1 << 3
_PERF_EVENT_IOC_ENABLE = 0x2400  # _IO('$', 0)
_PERF_EVENT_IOC_DISABLE = 0x2401  # _IO('$', 1)

_PERF_TYPE_SOFTWARE = 1
_PERF_COUNT_SW_TASK_CLOCK = 1
_PERF_SAMPLE_IP = 1 << 0
_PERF_SAMPLE_TID = 1 << 1
_PERF_SAMPLE_REGS_USER = 1 << 12
_PERF_SAMPLE_STACK_USER = 1 << 13
_PERF_REG_X86_SP = 7  # arch/x86/include/uapi/asm/perf_regs.h
# Bits of the flag word of struct perf_event_attr.
_ATTR_DISABLED = 1 << 0
_ATTR_EXCLUDE_KERNEL = 1 << 5
_ATTR_EXCLUDE_HV = 1 << 6
_ATTR_WATERMARK = 1 << 14
# type, size, config, sample_period, sample_type, read_format, flags, wakeup_watermark,
# bp_type, config1: the first 64 bytes, PERF_ATTR_SIZE_VER0, which every kernel knows.
_ATTR = struct.Struct("=IIQQQQQIIQ")
# config2, branch_sample_type, sample_regs_user, sample_stack_user, clockid: up to 96 bytes,
# PERF_ATTR_SIZE_VER3 of Linux 3.7 (4018994f3d87, "perf: Add ability to attach user stack dump
# to sample"; 3.4 had 72 bytes).
_ATTR_STACK = struct.Struct("=QQQIi")

MAX_STACK_WORDS = 64
"""Words of stack that a sample can have: with them it takes 560 bytes of the ring."""

_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_libc = ctypes.CDLL(None, use_errno=True)


class ThreadClock:
    """A clock of one thread that samples where it is; made disabled.

    Task-clock and cpu-clock sample with the same timer; it runs only while the
    thread does and keeps what is left of its period across context switches,
    so that threads which run in short bursts are sampled in proportion.

    Args:
        tid: The thread.
        period_ns: CPU time from one sample to the next.
        n_pages: Size of the ring's data, a power of two.
        n_stack_words: Words of the stack that come with each sample: ``MAX_STACK_WORDS``
            where many are wanted, and at most what fits the ring and, with it, 64 KiB.

    Raises:
        ProcessGone: if the thread does not exist or has exited.
        PermissionDenied: if we may not watch it.
        UnsupportedTarget: if the kernel has no such clock.
        OptpolineError: if descriptors or lockable memory have run out.
    """

    def __init__(
        self, tid: int, *, period_ns: int, n_pages: int = 1, n_stack_words: int = 0
    ) -> None:
        """Open the event and map its ring."""
        self.tid = tid
        wakeup_size = n_pages * mmap.PAGESIZE // 2
        self._fd = _open_event(tid, _attr(period_ns, wakeup_size, n_stack_words))
        try:
            self._map = mmap.mmap(self._fd, (1 + n_pages) * mmap.PAGESIZE)
        except OSError as error:
            os.close(self._fd)
            raise _explain_map_error(tid, error) from error
        self._ring = SampleRing(memoryview(self._map))

    def close(self) -> None:
        """Unmap the ring and close the event; harmless when done twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            self._ring.release()
            self._map.close()
            os.close(fd)

    def fileno(self) -> int:
        """Return what poll waits on: readable half full, hung up when the thread exits."""
        return self._fd

    def enable(self) -> None:
        """Let it sample."""
        self._control(_PERF_EVENT_IOC_ENABLE)

    def disable(self) -> None:
        """Let it rest."""
        self._control(_PERF_EVENT_IOC_DISABLE)

    def drain(self) -> RingRecords:
        """Take the samples out of the ring."""
        return self._ring.drain()

    def drain_last_stack(self) -> StackSample | None:
        """Do so; return the last one, with all its stack, or None if there is none."""
        return self._ring.drain_last_stack()

    def _control(self, request: int) -> None:
        """Switch it; that of a thread that has exited stays as it is."""
        try:
            fcntl.ioctl(self._fd, request, 0)
        except OSError as error:
            # Since 6.16 the event of a task that is gone says so here.
            if error.errno != errno.ENODEV:
                raise OptpolineError(
                    f"the clock of thread {self.tid} cannot be switched: {error.strerror}"
                ) from error


def _attr(period_ns: int, wakeup_size: int, n_stack_words: int) -> bytes:
    """Return the struct perf_event_attr of a disabled task clock."""
    stack = b""
    fields = _PERF_SAMPLE_IP | _PERF_SAMPLE_TID
    if n_stack_words:
        fields |= _PERF_SAMPLE_REGS_USER | _PERF_SAMPLE_STACK_USER
        stack = _ATTR_STACK.pack(0, 0, 1 << _PERF_REG_X86_SP, n_stack_words * WORD_SIZE, 0)
    head = _ATTR.pack(
        _PERF_TYPE_SOFTWARE,
        _ATTR.size + len(stack),
        _PERF_COUNT_SW_TASK_CLOCK,
        period_ns,
        fields,
        0,
        _ATTR_DISABLED | _ATTR_EXCLUDE_KERNEL | _ATTR_EXCLUDE_HV | _ATTR_WATERMARK,
        wakeup_size,
        0,
        0,
    )
    return head + stack


def _open_event(tid: int, attr: bytes) -> int:
    """Return the descriptor of an event that samples one thread."""
    any_cpu = no_group = ctypes.c_long(-1)
    fd = int(
        _libc.syscall(
            ctypes.c_long(_SYS_PERF_EVENT_OPEN), ctypes.c_char_p(attr), ctypes.c_long(tid),
            any_cpu, no_group, ctypes.c_ulong(_PERF_FLAG_FD_CLOEXEC),
        )
    )  # fmt: skip
    if fd < 0:
        number = ctypes.get_errno()
        raise _explain_open_error(tid, number) from OSError(number, os.strerror(number))
    return fd


def _explain_open_error(tid: int, number: int) -> OptpolineError:
    """Return the error to raise for an errno of perf_event_open."""
    if number == errno.ESRCH:
        return ProcessGone(tid, f"thread {tid} has exited or never existed")
    if number in (errno.EACCES, errno.EPERM):
        level = _read_paranoid()
        return PermissionDenied(
            f"we may not sample thread {tid} with perf events "
            f"(kernel.perf_event_paranoid is {'unknown' if level is None else level})",
            hint="run with CAP_PERFMON or as root, or set kernel.perf_event_paranoid to 2 or less"
            if level is not None and level > 2
            else "run as the user of the process or with CAP_PERFMON; in a container its "
            "seccomp filter must allow perf_event_open",
        )
    if number in (errno.ENOSYS, errno.ENOENT, errno.EOPNOTSUPP, errno.ENODEV):
        return UnsupportedTarget(
            f"this kernel has no software clock events: {os.strerror(number)}",
            hint="it needs CONFIG_PERF_EVENTS",
        )
    hint = "raise the limit of open files" if number in (errno.EMFILE, errno.ENFILE) else None
    return OptpolineError(f"thread {tid} cannot be sampled: {os.strerror(number)}", hint=hint)


def _explain_map_error(tid: int, error: OSError) -> OptpolineError:
    """Return the error to raise when the ring cannot be mapped."""
    if error.errno == errno.EPERM:  # perf_mmap's answer to the limit of locked memory
        hint = "raise kernel.perf_event_mlock_kb or the limit of locked memory"
    elif error.errno in (errno.EMFILE, errno.ENFILE):
        hint = "raise the limit of open files"
    else:
        hint = None
    return OptpolineError(
        f"the samples of thread {tid} cannot be mapped: {error.strerror}", hint=hint
    )


def _read_paranoid() -> int | None:
    """Return kernel.perf_event_paranoid, None where it cannot be read."""
    try:
        return int(_PARANOID.read_text())
    except (OSError, ValueError):
        return None
