# SPDX-License-Identifier: Apache-2.0
"""Rings as the kernel would leave them, the errors of opening, and shares."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import struct

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.errors import (
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    UnsupportedTarget,
    UsageError,
)
from optpoline.model import Addr
from optpoline.process import perf, perf_event
from optpoline.process.perf import MAX_FREQUENCY_HZ, PcSample, PcSampler, share_within
from optpoline.process.perf_event import MAX_STACK_WORDS, ThreadClock
from optpoline.process.perf_ring import RECORD_SIZE, SampleRing, StackSample

PAGE = 4096
USER, KERNEL, GUEST_USER = 2, 1, 5
LOST, THROTTLE, SAMPLE = 2, 5, 9


class KernelSide:
    """The writer of a ring: puts records where the kernel would."""

    def __init__(self, start: int = 0) -> None:
        """Begin with an empty ring whose ends stand anywhere."""
        self.buffer = bytearray(2 * PAGE)
        self.head = start
        struct.pack_into("=QQ", self.buffer, 1024, start, start)
        self.ring = SampleRing(memoryview(self.buffer), header_size=PAGE)

    @property
    def tail(self) -> int:
        """Where the reader says it is."""
        return int(struct.unpack_from("=Q", self.buffer, 1032)[0])

    def put(self, kind: int, body: bytes, misc: int = USER, size: int | None = None) -> None:
        """Write one record, byte by byte around the end."""
        record = struct.pack("=IHH", kind, misc, len(body) + 8 if size is None else size) + body
        for index, byte in enumerate(record):
            self.buffer[PAGE + (self.head + index) % PAGE] = byte
        self.head += len(record)
        struct.pack_into("=Q", self.buffer, 1024, self.head)

    def put_sample(self, tid: int, pc: int, misc: int = USER) -> None:
        """Write a sample."""
        self.put(SAMPLE, struct.pack("=QII", pc, 7, tid), misc)

    def put_stack(self, tid: int, pc: int, words: tuple[int, ...], n_wanted: int) -> None:
        """Write a sample with as much of its stack as there is, padded to what was wanted."""
        body = struct.pack("=QIIQQQ", pc, 7, tid, 2, 0x7FFF_0000, 8 * n_wanted)
        body += struct.pack(f"={len(words)}Q", *words).ljust(8 * n_wanted, b"\xee")
        self.put(SAMPLE, body + struct.pack("=Q", 8 * len(words)))

    def put_lost(self, n_lost: int) -> None:
        """Write what the kernel writes before the first record that fits again."""
        self.put(LOST, struct.pack("=QQ", 99, n_lost), 0)


def test_an_empty_ring_has_nothing() -> None:
    kernel = KernelSide(start=12345)
    assert kernel.ring.drain().samples == ()
    assert kernel.tail == 12345


def test_samples_come_in_order_and_make_room() -> None:
    kernel = KernelSide()
    kernel.put_sample(1, 0x401000)
    kernel.put_sample(2, 0x7FFF_FFFF_F000)
    records = kernel.ring.drain()
    assert records.samples == ((1, 0x401000), (2, 0x7FFF_FFFF_F000))
    assert records.n_lost == 0
    assert kernel.tail == kernel.head == 2 * RECORD_SIZE
    assert kernel.ring.drain().samples == ()


def test_lost_records_are_counted_and_others_passed_over() -> None:
    kernel = KernelSide()
    kernel.put_sample(1, 10)
    kernel.put_lost(5)
    kernel.put(THROTTLE, bytes(24))
    kernel.put_lost(2)
    kernel.put_sample(1, 20)
    records = kernel.ring.drain()
    assert records.samples == ((1, 10), (1, 20))
    assert records.n_lost == 7


def test_only_the_program_counts() -> None:
    kernel = KernelSide()
    kernel.put_sample(1, 10, KERNEL)
    kernel.put_sample(1, 20, GUEST_USER)
    kernel.put_sample(1, 30, USER | 1 << 14)
    assert kernel.ring.drain().samples == ((1, 30),)


@pytest.mark.parametrize("left", range(8, 33, 8))
def test_a_record_may_wrap_at_any_word(left: int) -> None:
    kernel = KernelSide(start=(1 << 40) + PAGE - left)
    kernel.put_sample(3, 0x1122_3344_5566)
    kernel.put_sample(4, 0x77)
    assert kernel.ring.drain().samples == ((3, 0x1122_3344_5566), (4, 0x77))
    assert kernel.tail == kernel.head


def test_a_full_ring() -> None:
    kernel = KernelSide(start=PAGE - 24)
    for index in range(PAGE // RECORD_SIZE):
        kernel.put_sample(1, index)
    kernel.put(THROTTLE, bytes(PAGE % RECORD_SIZE - 8))
    assert kernel.head - kernel.tail == PAGE
    assert [pc for _, pc in kernel.ring.drain().samples] == list(range(PAGE // RECORD_SIZE))


@given(
    start=st.integers(0, 1 << 50).map(lambda word: word * 8),
    batches=st.lists(
        st.lists(
            st.one_of(
                st.tuples(st.integers(1, 1 << 22), st.integers(0, (1 << 64) - 1)),
                st.integers(1, 1 << 32),
            ),
            max_size=PAGE // RECORD_SIZE,
        ),
        max_size=4,
    ),
)
def test_what_goes_in_comes_out(start: int, batches: list[list[tuple[int, int] | int]]) -> None:
    kernel = KernelSide(start)
    for batch in batches:
        for item in batch:
            if isinstance(item, int):
                kernel.put_lost(item)
            else:
                kernel.put_sample(*item)
        records = kernel.ring.drain()
        assert records.samples == tuple(item for item in batch if isinstance(item, tuple))
        assert records.n_lost == sum(item for item in batch if isinstance(item, int))
        assert kernel.tail == kernel.head


@pytest.mark.parametrize("words", [(), (1,), (1, 2, 0x7FFF_FFFF_FFFF)])
def test_a_stack_comes_as_far_as_there_is_one(words: tuple[int, ...]) -> None:
    kernel = KernelSide(start=PAGE - 40)
    kernel.put_stack(3, 0x401000, words, 3)
    kernel.put_stack(4, 0x402000, (9,), 3)
    assert kernel.ring.drain().samples == ((3, 0x401000, *words), (4, 0x402000, 9))


def test_the_last_stack_comes_whole_with_its_pointer() -> None:
    kernel = KernelSide(start=PAGE - 40)
    assert kernel.ring.drain_last_stack() is None
    kernel.put_stack(3, 0x401000, (1, 2, 3), 3)
    kernel.put_stack(3, 0x402000, (9, 8), 3)
    kernel.put(SAMPLE, struct.pack("=QIIQQ", 0x403000, 7, 3, 0, 0))
    kernel.put_lost(5)
    expected = StackSample(pc=0x402000, sp=0x7FFF_0000, stack=struct.pack("=QQ", 9, 8))
    assert kernel.ring.drain_last_stack() == expected
    kernel.put(SAMPLE, struct.pack("=QIIQQQQQ", 0x401000, 7, 3, 2, 0, 64, 1, 8))
    with pytest.raises(OptpolineError, match="ring"):
        kernel.ring.drain_last_stack()


def test_a_thread_that_has_no_user_stack() -> None:
    """A struct perf_regs_user of PERF_SAMPLE_REGS_ABI_NONE: no register, and a stack of size 0."""
    kernel = KernelSide()
    kernel.put(SAMPLE, struct.pack("=QIIQQ", 0x401000, 7, 3, 0, 0))
    assert kernel.ring.drain().samples == ((3, 0x401000),)


def test_a_stack_longer_than_its_record_is_an_error() -> None:
    kernel = KernelSide()
    kernel.put(SAMPLE, struct.pack("=QIIQQQQQ", 0x401000, 7, 3, 2, 0, 64, 1, 8))
    with pytest.raises(OptpolineError, match="ring"):
        kernel.ring.drain()


@pytest.mark.parametrize("size", [0, 4, 7, 4000])
def test_a_broken_record_is_an_error_once(size: int) -> None:
    kernel = KernelSide()
    kernel.put(SAMPLE, bytes(16), size=size)
    with pytest.raises(OptpolineError, match="ring"):
        kernel.ring.drain()
    kernel.put_sample(1, 2)
    assert kernel.ring.drain().samples == ((1, 2),)


@pytest.mark.parametrize("n_bytes", [4, PAGE + 8, 1 << 63])
def test_ends_that_make_no_sense_are_an_error(n_bytes: int) -> None:
    kernel = KernelSide()
    struct.pack_into("=Q", kernel.buffer, 1024, n_bytes)
    with pytest.raises(OptpolineError, match="ring"):
        kernel.ring.drain()


class _RefusingLibc:
    """A C library whose system calls fail."""

    def __init__(self, number: int) -> None:
        """Choose the error."""
        self._number = number

    def syscall(self, *_: object) -> int:
        """Fail."""
        ctypes.set_errno(self._number)
        return -1


@pytest.mark.parametrize(
    ("number", "kind", "words"),
    [
        (errno.EACCES, PermissionDenied, "perf_event_paranoid is 4.*CAP_PERFMON.*2 or less"),
        (errno.EPERM, PermissionDenied, "perf_event_paranoid is 4"),
        (errno.ENOSYS, UnsupportedTarget, "CONFIG_PERF_EVENTS"),
        (errno.ENOENT, UnsupportedTarget, "software clock"),
        (errno.ESRCH, ProcessGone, "thread 42"),
        (errno.EMFILE, OptpolineError, "open files"),
        (errno.EINVAL, OptpolineError, "thread 42 cannot be sampled"),
    ],
)
def test_each_refusal_has_its_error(
    monkeypatch: pytest.MonkeyPatch, number: int, kind: type[OptpolineError], words: str
) -> None:
    monkeypatch.setattr(perf_event, "_libc", _RefusingLibc(number))
    monkeypatch.setattr(perf_event, "_read_paranoid", lambda: 4)
    with pytest.raises(kind, match=words) as caught:
        ThreadClock(42, period_ns=1_000_000)
    assert type(caught.value) is kind
    assert isinstance(caught.value.__cause__, OSError)


def test_another_users_process_gets_other_advice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(perf_event, "_libc", _RefusingLibc(errno.EACCES))
    monkeypatch.setattr(perf_event, "_read_paranoid", lambda: 2)
    with pytest.raises(PermissionDenied, match=r"paranoid is 2\).*user of the process"):
        ThreadClock(42, period_ns=1_000_000)


def test_a_ring_that_may_not_be_mapped_leaves_nothing_open(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fds: list[int] = []

    def open_event(*_: object, **__: object) -> int:
        fds.append(os.open(os.devnull, os.O_RDWR))
        return fds[-1]

    def refuse(*_: object) -> None:
        raise PermissionError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(perf_event, "_open_event", open_event)
    monkeypatch.setattr(mmap, "mmap", refuse)
    with pytest.raises(OptpolineError, match="perf_event_mlock_kb"):
        ThreadClock(42, period_ns=1_000_000)
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(fds[0])


@pytest.mark.parametrize("frequency_hz", [-1, 0, MAX_FREQUENCY_HZ + 1])
def test_frequencies_out_of_range(frequency_hz: int) -> None:
    with pytest.raises(UsageError, match="Hz"):
        PcSampler(1, frequency_hz=frequency_hz)


@pytest.mark.parametrize("n_words", [-1, MAX_STACK_WORDS + 1])
def test_stacks_out_of_range(n_words: int) -> None:
    with pytest.raises(UsageError, match="words"):
        PcSampler(1, n_stack_words=n_words)


@pytest.mark.parametrize(
    ("limit_hz", "wanted_hz", "expected_hz"), [(100_000, 997, 997), (2000, 997, 500), (1, 997, 1)]
)
def test_the_kernels_limit_is_kept_far_away_from(
    monkeypatch: pytest.MonkeyPatch, limit_hz: int, wanted_hz: int, expected_hz: int
) -> None:
    monkeypatch.setattr(perf, "_read_max_sample_rate", lambda: limit_hz)
    with PcSampler(os.getpid(), frequency_hz=wanted_hz) as sampler:
        assert sampler.frequency_hz == expected_hz


def test_a_sample_was_met() -> None:
    with pytest.raises(UsageError):
        PcSample(tid=1, pc=Addr(1), count=0)


def test_no_sample_no_share() -> None:
    assert share_within([], [(Addr(0), Addr(10))]) == 0.0
    assert share_within([PcSample(tid=1, pc=Addr(1))], []) == 0.0


def test_ends_are_exclusive() -> None:
    ranges = [(Addr(10), Addr(20)), (Addr(20), Addr(21)), (Addr(30), Addr(40))]
    inside = {pc for pc in range(50) if share_within([PcSample(tid=1, pc=Addr(pc))], ranges)}
    assert inside == {*range(10, 21), *range(30, 40)}


@given(
    bounds=st.lists(st.integers(0, 300), unique=True, max_size=20).map(sorted),
    pcs=st.lists(st.tuples(st.integers(0, 310), st.integers(1, 9)), min_size=1),
)
def test_share_is_that_of_a_plain_search(bounds: list[int], pcs: list[tuple[int, int]]) -> None:
    ranges = [
        (Addr(start), Addr(end)) for start, end in zip(bounds[::2], bounds[1::2], strict=False)
    ]
    samples = [PcSample(tid=1, pc=Addr(pc), count=count) for pc, count in pcs]
    n_inside = sum(n for pc, n in pcs if any(start <= pc < end for start, end in ranges))
    assert share_within(samples, ranges) == n_inside / sum(n for _, n in pcs)
