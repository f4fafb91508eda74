# SPDX-License-Identifier: Apache-2.0
"""Learning blocks on this machine's CPU, under its kernel: every branch counted once.

A block, its counters and sixteen targets lie in memory of this process. Threads of it call
through the block in a loop of machine code while they are moved between CPUs, preempted by
each other, and interrupted by signals.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import signal
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from optpoline.learn.counting import plan_counting
from optpoline.model import SLOT_CLAIMED, Addr, BlockPlan, CounterRows, RseqAbi, tree_targets
from optpoline.x86.assembler import encode_disp32
from optpoline.x86.blocks import encode_block
from tests.emulate.block_kinds import LiteralTable, Way, balanced

N_THREADS = 4
N_CALLS = 16_000_000
"""Of each thread, a multiple of 16: a tenth of a second alone, and a hundred disturbances."""

_ROW_SHIFT = 12
_PAGE = 4096
_TARGETS_OFF, _LITERALS_OFF, _COUNTERS_OFF = 2 * _PAGE, 3 * _PAGE, 4 * _PAGE
_LOOP_OFF, _THUNK_OFF = _PAGE, _PAGE + 0x100
_LIBC = ctypes.CDLL(None, use_errno=True)
RSEQ_SIGNATURE = 0x53053053


def read_n_cpus() -> int:
    """Return the number of possible CPUs."""
    with open("/sys/devices/system/cpu/possible") as file:
        return int(file.read().strip().split("-")[-1].split(",")[-1]) + 1


@dataclass(slots=True)
class Bench:
    """A block in this process, and a loop that calls it.

    Attributes:
        memory: All of it.
        addr: Its address.
        way: How the block comes to its row.
    """

    memory: mmap.mmap
    addr: int
    way: Way

    @property
    def rows(self) -> CounterRows:
        """The counter rows."""
        offset = ctypes.c_ssize_t.in_dll(_LIBC, "__rseq_offset").value
        rseq = RseqAbi(offset=offset, signature=RSEQ_SIGNATURE)
        return CounterRows(
            shared_addr=Addr(self.addr + _COUNTERS_OFF),
            row_shift=_ROW_SHIFT,
            n_cpus=read_n_cpus(),
            rseq=None if self.way is Way.SEGMENT else rseq,
        )

    @property
    def targets(self) -> tuple[Addr, ...]:
        """Sixteen functions that return."""
        return tuple(Addr(self.addr + _TARGETS_OFF + 64 * i) for i in range(16))

    def plan(self, n_known: int) -> BlockPlan:
        """Return a counting block's plan."""
        return plan_counting(
            operand="rdx",
            thunk_addr=Addr(self.addr + _THUNK_OFF),
            tree=balanced(self.targets[:n_known]),
            n_open=4,
            cells_addr=self.rows.shared_addr,
            rows=self.rows,
            is_below_stack_free=self.way is Way.CALL,
        )

    def load(self, plan: BlockPlan) -> None:
        """Write the block, its literals, its targets and the loop; counters are 0."""
        literals = LiteralTable(Addr(self.addr + _LITERALS_OFF))
        block = encode_block(plan, Addr(self.addr), literals).code
        assert len(block) <= _LOOP_OFF
        loop = self.addr + _LOOP_OFF
        #      mov %edi,%eax ; and $15,%eax ; mov (%rsi,%rax,8),%rdx ; call block
        head = bytes.fromhex("89f8 83e00f 488b14c6 e8")
        call = head + encode_disp32(loop + len(head) + 4, self.addr)
        #      dec %rdi ; jnz loop ; ret
        code = call + b"\x48\xff\xcf\x75" + struct.pack("b", -len(call) - 5) + b"\xc3"
        self.memory[: len(block)] = block
        self.memory[_LOOP_OFF : _LOOP_OFF + len(code)] = code
        # jmp *%rdx, as the thunk's part is none of ours here
        self.memory[_THUNK_OFF : _THUNK_OFF + 2] = b"\xff\xe2"
        for target in self.targets:
            self.memory[target - self.addr] = 0xC3  # ret
        for value, addr in literals.values.items():
            struct.pack_into("<Q", self.memory, addr - self.addr, value)
        n_bytes = ctypes.c_size_t(_COUNTERS_OFF)
        assert not _LIBC.mprotect(ctypes.c_void_p(self.addr), n_bytes, 5)  # r-x

    def run(self, n_calls: int, targets: tuple[Addr, ...]) -> None:
        """Call sixteen targets in turn, from this thread."""
        table = (ctypes.c_uint64 * 16)(*targets)
        loop = ctypes.CFUNCTYPE(None, ctypes.c_uint64, ctypes.c_void_p)(self.addr + _LOOP_OFF)
        loop(n_calls, ctypes.addressof(table))

    def read(self, cell: Addr, row: int) -> int:
        """Return a counter cell of a row."""
        off = cell - self.addr + (row << _ROW_SHIFT)
        return int(struct.unpack_from("<Q", self.memory, off)[0])


@pytest.fixture
def bench(request: pytest.FixtureRequest) -> Iterator[Bench]:
    """Yield memory for a block and its counters."""
    size = _COUNTERS_OFF + (1 + read_n_cpus() << _ROW_SHIFT)
    memory = mmap.mmap(-1, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    place = (ctypes.c_char * size).from_buffer(memory)
    yield Bench(memory, ctypes.addressof(place), request.param)
    del place
    memory.close()


def disturb(bench: Bench, targets: tuple[Addr, ...]) -> None:
    """Call from several threads while they are moved about and interrupted."""
    cpus = sorted(os.sched_getaffinity(0))
    work = (N_CALLS, targets)
    threads = [threading.Thread(target=bench.run, args=work) for _ in range(N_THREADS)]
    before = signal.signal(signal.SIGALRM, lambda *_: None)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for thread in threads:
            thread.start()
        n_moves = 0
        while any(thread.is_alive() for thread in threads):
            n_moves += 1
            for number, thread in enumerate(threads):
                try:
                    cpu = cpus[(n_moves + number) % len(cpus)]
                    os.sched_setaffinity(thread.native_id or 0, {cpu})
                except ProcessLookupError:
                    continue
            # The signal lands in whichever thread does not block it; the loop as well.
            for thread in threads:
                if thread.is_alive() and thread.ident is not None:
                    signal.pthread_kill(thread.ident, signal.SIGALRM)
        for thread in threads:
            thread.join()
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("bench", Way, indirect=True, ids=lambda way: way.name)
@pytest.mark.parametrize("n_known", [16, 8, 0])
def test_every_branch_is_counted_once(bench: Bench, n_known: int) -> None:
    plan = bench.plan(n_known)
    bench.load(plan)
    disturb(bench, bench.targets)
    rows = range(1 + bench.rows.n_cpus)
    each = N_THREADS * N_CALLS // 16
    for target in tree_targets(plan.tree):
        cell = dict(plan.hit_count_addrs)[target]
        by_row = [bench.read(cell, row) for row in rows]
        assert sum(by_row) == each
    claimed: dict[int, int] = {}
    for slot in plan.open_slots:
        for row in rows:
            target = Addr(bench.read(slot.target_addr, row))
            hits = bench.read(slot.count_addr, row) & SLOT_CLAIMED - 1
            claimed[target] = claimed.get(target, 0) + hits
    assert plan.miss_count_addr is not None
    n_unknown = sum(bench.read(plan.miss_count_addr, row) for row in rows)
    assert sum(claimed.values()) + n_unknown == (16 - n_known) * each
    # No target has more counts than branches, and no two share a slot.
    assert set(claimed) - {0} <= set(bench.targets[n_known:])
    assert all(hits <= each for hits in claimed.values())
    assert claimed.get(0, 0) == 0


@pytest.mark.parametrize("bench", Way, indirect=True, ids=lambda way: way.name)
def test_one_cell_that_every_thread_counts_in(bench: Bench) -> None:
    # What is lost without restartable sequences here: some counts in most runs.
    plan = bench.plan(16)
    bench.load(plan)
    (target,) = set(bench.targets[3:4])
    disturb(bench, (target,) * 16)
    cell = dict(plan.hit_count_addrs)[target]
    rows = range(1 + bench.rows.n_cpus)
    assert sum(bench.read(cell, row) for row in rows) == N_THREADS * N_CALLS


@pytest.mark.parametrize("bench", [Way.CALL, Way.SEGMENT], indirect=True, ids=lambda w: w.name)
def test_counts_are_in_the_rows_of_the_cpus_used(bench: Bench) -> None:
    plan = bench.plan(16)
    bench.load(plan)
    cpus = os.sched_getaffinity(0)
    try:
        for cpu in cpus:
            os.sched_setaffinity(0, {cpu})
            bench.run(16 * 1000, bench.targets)
    finally:
        os.sched_setaffinity(0, cpus)
    for _, cell in plan.hit_count_addrs:
        by_row = [bench.read(cell, row) for row in range(1 + bench.rows.n_cpus)]
        assert sum(by_row) == 1000 * len(cpus)
        for cpu in cpus:
            # But for those that were disturbed, or whose loop had not begun there.
            assert by_row[1 + cpu] > 900
