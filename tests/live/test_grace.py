# SPDX-License-Identifier: Apache-2.0
"""Grace periods of programs that run on stacks of their own making, and of debugged ones.

The code that is retired is the program's own: functions that stand for blocks.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import pytest

from optpoline.controller.address_space import child_space
from optpoline.controller.observer import ThreadObserver
from optpoline.model import Addr
from optpoline.patch.grace import GracePeriods, RetiredCode
from optpoline.patch.ranges import AddressRanges
from optpoline.process.procfs import list_tids, read_maps
from optpoline.process.ptrace import StopCode, Tracer
from optpoline.process.thread_state import read_thread_state
from optpoline.process.tracer_thread import TracerThread
from optpoline.x86.registers import Registers
from tests.live.conftest import LiveTarget, StartTarget

pytestmark = pytest.mark.live

_TIMEOUT_S = 30.0
_RETURN_SIZE = 8
_ALL_ONES = (1 << 64) - 1


@dataclass(frozen=True, slots=True)
class Places:
    """Where the target's blocks and its function that sleeps are."""

    first: RetiredCode
    second: RetiredCode
    nap: int

    @classmethod
    def of(cls, target: LiveTarget) -> Places:
        """Ask the target."""
        at = [Addr(int(word, 16) ^ _ALL_ONES) for word in target.ask("w").split()]
        return cls(RetiredCode(at[0], at[1]), RetiredCode(at[2], at[3]), at[4])


def watch(target: LiveTarget) -> tuple[GracePeriods, ThreadObserver]:
    """Return grace periods of the target."""
    space = child_space(target.pid, may_stop=True, timeout_ns=10**9)
    observer = ThreadObserver(lambda: (space,))
    return GracePeriods(observer), observer


@pytest.mark.parametrize("mode", ["inside", "below"])
def test_stack_that_lies_in_another(start_target: StartTarget, mode: str) -> None:
    target = start_target("stacks", mode)
    places = Places.of(target)
    target.wait_for_state("S")
    grace, observer = watch(target)
    grace.retire(places.first)
    grace.retire(places.second)
    assert grace.synchronize(_TIMEOUT_S)
    # Its thread was seen on what looks like its own stack, and holds nothing.
    assert grace.holders == ()
    assert grace.take_expired() == (places.second,)
    assert observer.is_switching()
    assert target.ask("g") == "left"
    target.finish()


def test_thread_that_goes_from_one_block_to_another(start_target: StartTarget) -> None:
    target = start_target("stacks", "moving")
    places = Places.of(target)
    target.wait_for_state("S")
    grace, _ = watch(target)
    grace.retire(places.first)
    grace.retire(places.second)
    handle = grace.start_poll()
    assert not grace.poll(handle)
    assert target.ask("g") == "moved"
    target.wait_for_state("S")
    while not grace.poll(handle):
        assert grace.take_expired() == ()
    assert grace.take_expired() == (places.first,)
    assert target.ask("g") == "left"
    target.finish()


@contextmanager
def nap_as_a_debugger_calls_it(target: LiveTarget, nap: int) -> Iterator[Registers]:
    """Have the first thread sleep in a call whose return only a debugger knows."""

    def stop(tracer: Tracer) -> Registers:
        tracer.interrupt(target.pid)
        deadline = time.monotonic() + _TIMEOUT_S
        code: StopCode | None = None
        while code is None:
            assert time.monotonic() < deadline
            code = tracer.poll(target.pid)
        return tracer.read_registers(target.pid)

    def call(tracer: Tracer) -> Registers:
        tracer.seize(target.pid)
        regs = stop(tracer)
        sp = (regs.rsp - 4096) & -16 | _RETURN_SIZE
        tracer.write_registers(target.pid, regs._replace(rip=nap, rsp=sp, orig_rax=_ALL_ONES))
        tracer.cont(target.pid)
        return regs

    def come_back(tracer: Tracer, regs: Registers) -> None:
        stop(tracer)
        tracer.write_registers(target.pid, regs)
        tracer.detach(target.pid)

    debugger = TracerThread()
    try:
        regs = debugger.call(call)
        target.wait_for_state("S")
        yield regs
        debugger.call(lambda tracer: come_back(tracer, regs))
    finally:
        debugger.finish()


def test_thread_in_a_call_of_a_debugger_is_not_outside(start_target: StartTarget) -> None:
    target = start_target("stacks", "spin")
    places = Places.of(target)
    grace, _ = watch(target)
    grace.retire(places.first)
    handle = grace.start_poll()
    with nap_as_a_debugger_calls_it(target, places.nap) as regs:
        assert places.first.start <= regs.rip < places.first.end
        assert not grace.poll(handle)
        assert (target.pid, target.pid) in grace.holders
    # Back in the block it is seen there, in a stop.
    assert grace.synchronize(_TIMEOUT_S)
    assert grace.holders == ((target.pid, target.pid),)
    assert grace.take_expired() == ()
    assert target.ask("g") == "left"
    assert grace.synchronize(_TIMEOUT_S)
    assert grace.take_expired() == (places.first,)
    target.finish()


def test_stack_below_a_large_allocation(start_target: StartTarget) -> None:
    target = start_target("stacks", "neighbour", "80")
    places = Places.of(target)
    target.wait_for_sleep(9)
    maps = read_maps(target.pid)
    stack_ends = {
        next(m.end for m in maps if m.start <= state.sp < m.end)
        for state in (read_thread_state(target.pid, tid) for tid in list_tids(target.pid))
    }
    assert any(m.start in stack_ends and m.size > 64 << 20 for m in maps)
    grace, _ = watch(target)
    grace.retire(places.first)
    assert grace.synchronize(_TIMEOUT_S)
    assert grace.take_expired() == (places.first,)
    assert grace.statistics.n_stops == 0
    target.finish()


def test_threads_that_run_are_told_without_a_stop(start_target: StartTarget) -> None:
    target = start_target("stacks", "spin")
    places = Places.of(target)
    space = child_space(target.pid, may_stop=False, timeout_ns=0)
    observer = ThreadObserver(lambda: (space,), samples=True)
    ranges = AddressRanges((code.start, code.end) for code in (places.first, places.second))
    spinner = (target.pid, target.pid)
    deadline = time.monotonic() + _TIMEOUT_S
    # Where it is, and not where it is not.
    while spinner not in (look := observer.look(ranges, ())).holding:
        assert spinner not in look.quiescent
        assert time.monotonic() < deadline
    assert all(places.first.start <= addr < places.first.end for addr in look.holding[spinner])
    ranges = AddressRanges([(places.second.start, places.second.end)])
    while spinner not in (look := observer.look(ranges, ())).quiescent:
        assert spinner not in look.holding
        assert time.monotonic() < deadline
    target.finish()
