# SPDX-License-Identifier: Apache-2.0
"""The ring that the samples of a perf event arrive in: our end of it, and its records.

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

import mmap
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

from optpoline.errors import OptpolineError

__all__ = ["RECORD_SIZE", "WORD_SIZE", "RingRecords", "SampleRing", "StackSample"]

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
_LOST = struct.Struct("=QQ")  # id, lost
RECORD_SIZE = _HEADER.size + _SAMPLE.size
"""Bytes that a sample without a stack takes in the ring."""

WORD_SIZE = 8
"""Bytes of a word of a stack."""

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
    off += _ABI.size + (WORD_SIZE if abi else 0)
    (size,) = _SIZE.unpack_from(records, off)
    off += _SIZE.size
    if not size:
        return ()
    if off + size + _SIZE.size != end:
        raise OptpolineError(f"a perf ring holds a stack of {size} bytes in too short a record")
    (n_valid,) = _SIZE.unpack_from(records, off + size)
    return struct.unpack_from(f"={min(n_valid, size) // WORD_SIZE}Q", records, off)


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
