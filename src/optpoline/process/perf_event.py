# SPDX-License-Identifier: Apache-2.0
"""The clock event of one thread, and the ring its samples arrive in.

A thin layer over perf_event_open(2), for one use: a software clock that ticks
while a thread runs and notes where it is in user code. The kernel's timer does
the work, so it needs no performance counter and runs on virtual machines. The
thread is not stopped and cannot tell. With each place come, if wanted, the first
words of its stack: what is called from where says more than the place alone.

The ring as mapped, in pages (struct perf_event_mmap_page)::

    0          1024        1032         1 page             1 + n pages
    | ...      | data_head | data_tail  | records           |

``data_head`` and ``data_tail`` only grow; modulo the size of the data they are
the places where the kernel writes and we read. A record may wrap. What does not
fit is dropped, and the next record that fits is preceded by a PERF_RECORD_LOST
with the number; so losses at the very end stay untold.

Constants: include/uapi/linux/perf_event.h.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import mmap
import os
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone, UnsupportedTarget

__all__ = [
    "MAX_STACK_WORDS",
    "RECORD_SIZE",
    "RingRecords",
    "SampleRing",
    "StackSample",
    "ThreadClock",
]

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

# Places in struct perf_event_mmap_page, as indices of 8-byte words.
_DATA_HEAD = 1024 // 8
_DATA_TAIL = 1032 // 8

_PERF_RECORD_LOST = 2
_PERF_RECORD_SAMPLE = 9
_PERF_RECORD_MISC_CPUMODE_MASK = 7
_PERF_RECORD_MISC_USER = 2
_HEADER = struct.Struct("=IHH")  # type, misc, size
_SAMPLE = struct.Struct("=QII")  # ip, pid, tid
# Behind it, with a stack: abi and, unless that is 0, the stack pointer; then the size asked
# for, so many bytes, and how many of them are the stack's.
_ABI = _SIZE = struct.Struct("=Q")
_ABI_SP_SIZE = struct.Struct("=QQQ")
_PERF_SAMPLE_REGS_ABI_64 = 2
_WORD_SIZE = 8
_LOST = struct.Struct("=QQ")  # id, lost
RECORD_SIZE = _HEADER.size + _SAMPLE.size
"""Bytes that a sample without a stack takes in the ring."""

MAX_STACK_WORDS = 64
"""Words of stack that a sample can have: with them it takes 560 bytes of the ring."""

_PARANOID = Path("/proc/sys/kernel/perf_event_paranoid")
_libc = ctypes.CDLL(None, use_errno=True)
_Decoded = TypeVar("_Decoded")


@dataclass(frozen=True, slots=True, kw_only=True)
class RingRecords:
    """What was taken out of a ring.

    Attributes:
        samples: Thread id and user program counter of each sample, oldest first; then the
            words of its stack, lowest address first, as many as were wanted and are there.
        n_lost: Samples that the kernel says it dropped because the ring was full.
    """

    samples: tuple[tuple[int, ...], ...]
    n_lost: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StackSample:
    """A thread at one instant: the kernel took all of it in one interrupt of user code.

    Attributes:
        pc: User program counter.
        sp: Stack pointer.
        stack: The bytes from there up, as many as were wanted and are there.
    """

    pc: int
    sp: int
    stack: bytes


class SampleRing:
    """Our end of a ring.

    Args:
        buffer: The control page and the data behind it, writable; the data's
            size is a power of two. The caller owns it, and calls ``release``
            before unmapping it.
        header_size: Size of the control page in bytes.
    """

    def __init__(self, buffer: memoryview, *, header_size: int = mmap.PAGESIZE) -> None:
        """Lay words over the control page and bytes over the data."""
        self._control = buffer[:header_size].cast("Q")
        self._data = buffer[header_size:]
        self._size = len(self._data)

    def release(self) -> None:
        """Let go of the buffer."""
        self._control.release()
        self._data.release()

    def drain(self) -> RingRecords:
        """Take all records out and give their room back to the kernel.

        Raises:
            OptpolineError: if the ring holds no whole records; all of it is skipped.
        """
        return self._decode(_decode_records)

    def drain_last_stack(self) -> StackSample | None:
        """Do so, but return the last user sample with all its stack, None if there is none.

        Raises:
            OptpolineError: if the ring holds no whole records; all of it is skipped.
        """
        return self._decode(_decode_last_stack)

    def _decode(self, decode: Callable[[bytes], _Decoded]) -> _Decoded:
        """Take all records out and decode them."""
        try:
            return decode(self._take())
        except struct.error as error:
            raise OptpolineError("a perf ring ends in the middle of a record") from error

    def _take(self) -> bytes:
        """Return all records and give their room back."""
        # Pairs with the write barrier before the kernel stores data_head
        # (perf_output_put_handle): x86 does not reorder loads, so the records below
        # data_head are whole. Another architecture needs a read barrier here.
        head = self._control[_DATA_HEAD]
        tail = self._control[_DATA_TAIL]
        if head == tail:
            return b""
        records = self._copy(tail, head)
        # After the copy, never before: the kernel overwrites what lies below data_tail.
        # One aligned 8-byte store, which x86 does not move ahead of the loads above.
        self._control[_DATA_TAIL] = head
        return records

    def _copy(self, tail: int, head: int) -> bytes:
        """Return the bytes from tail to head, straightened where they wrap."""
        n_bytes = head - tail
        if not 0 < n_bytes <= self._size:
            return b"\0"  # not a record
        start = tail % self._size
        end = start + n_bytes
        if end <= self._size:
            return bytes(self._data[start:end])
        return bytes(self._data[start:]) + bytes(self._data[: end - self._size])


def _split_records(records: bytes) -> Iterator[tuple[int, int, int, int]]:
    """Yield of each record (kind, misc, where its body begins, where it ends)."""
    off = 0
    while off < len(records):
        kind, misc, size = _HEADER.unpack_from(records, off)
        if size < _HEADER.size or off + size > len(records):
            raise OptpolineError(f"a perf ring holds a record of {size} bytes, which is none")
        yield kind, misc, off + _HEADER.size, off + size
        off += size


def _is_user_sample(kind: int, misc: int) -> bool:
    """Tell whether a record is a sample of the program."""
    # Not all that is outside the kernel is the program: a guest's PC is not.
    is_user = misc & _PERF_RECORD_MISC_CPUMODE_MASK == _PERF_RECORD_MISC_USER
    return kind == _PERF_RECORD_SAMPLE and is_user


def _decode_records(records: bytes) -> RingRecords:
    """Pick the user samples and the losses out of whole records."""
    samples: list[tuple[int, ...]] = []
    n_lost = 0
    for kind, misc, body, end in _split_records(records):
        if _is_user_sample(kind, misc):
            pc, _, tid = _SAMPLE.unpack_from(records, body)
            stack = _decode_stack(records, body + _SAMPLE.size, end)
            samples.append((tid, pc, *stack))
        elif kind == _PERF_RECORD_LOST:
            n_lost += _LOST.unpack_from(records, body)[1]
    return RingRecords(samples=tuple(samples), n_lost=n_lost)


def _decode_stack(records: bytes, off: int, end: int) -> tuple[int, ...]:
    """Return the words of the stack that a sample carries, none if it carries none."""
    if off == end:
        return ()
    (abi,) = _ABI.unpack_from(records, off)
    off += _ABI.size + (_WORD_SIZE if abi else 0)
    (size,) = _SIZE.unpack_from(records, off)
    off += _SIZE.size
    if not size:
        return ()
    if off + size + _SIZE.size != end:
        raise OptpolineError(f"a perf ring holds a stack of {size} bytes in too short a record")
    (n_valid,) = _SIZE.unpack_from(records, off + size)
    return struct.unpack_from(f"={min(n_valid, size) // _WORD_SIZE}Q", records, off)


def _decode_last_stack(records: bytes) -> StackSample | None:
    """Return the last user sample of whole records, with its stack."""
    last: StackSample | None = None
    for kind, misc, body, end in _split_records(records):
        if not _is_user_sample(kind, misc):
            continue
        pc, _, _ = _SAMPLE.unpack_from(records, body)
        at = body + _SAMPLE.size
        (abi,) = _ABI.unpack_from(records, at)
        if abi == _PERF_SAMPLE_REGS_ABI_64:
            _, sp, wanted = _ABI_SP_SIZE.unpack_from(records, at)
            at += _ABI_SP_SIZE.size
            if wanted and at + wanted + _SIZE.size != end:
                raise OptpolineError(
                    f"a perf ring holds a stack of {wanted} bytes in too short a record"
                )
            n_valid = _SIZE.unpack_from(records, at + wanted)[0] if wanted else 0
            stack = records[at : at + min(n_valid, wanted)]
            last = StackSample(pc=pc, sp=sp, stack=stack)
    return last


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
        stack = _ATTR_STACK.pack(0, 0, 1 << _PERF_REG_X86_SP, n_stack_words * _WORD_SIZE, 0)
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
