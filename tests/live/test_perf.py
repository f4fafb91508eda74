# SPDX-License-Identifier: Apache-2.0
"""Sampling real programs: the right places, all threads, and their end."""

from __future__ import annotations

import mmap
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from optpoline.errors import PermissionDenied, ProcessGone, UnsupportedTarget, UsageError
from optpoline.model import Addr
from optpoline.process.perf import MAX_FREQUENCY_HZ, MAX_THREADS, PcSample, PcSampler, share_within
from optpoline.process.perf_event import ThreadClock
from optpoline.process.perf_ring import RECORD_SIZE
from optpoline.process.procfs import list_tids, read_status
from tests.live.conftest import LiveTarget, StartTarget

pytestmark = pytest.mark.live

FIXED = ("-no-pie",)  # symbols are addresses
_WINDOW_S = 0.1
_DEADLINE_S = 30.0


@pytest.fixture(scope="module", autouse=True)
def _perf() -> None:
    """Skip where perf events of one's own are not to be had."""
    try:
        ThreadClock(os.getpid(), period_ns=1_000_000).close()
    except (PermissionDenied, UnsupportedTarget) as error:
        pytest.skip(str(error))


def _read_range(pid: int, name: str) -> tuple[Addr, Addr]:
    with Path(f"/proc/{pid}/exe").open("rb") as file:
        table = ELFFile(file).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        symbols = table.get_symbol_by_name(name)
        assert symbols
        (symbol,) = symbols
        return Addr(symbol["st_value"]), Addr(symbol["st_value"] + symbol["st_size"])


def _sample_until(
    sampler: PcSampler, is_enough: Callable[[list[PcSample]], bool]
) -> list[PcSample]:
    """Add up windows: how much CPU time the target gets in one is not ours to say."""
    deadline = time.monotonic() + _DEADLINE_S
    samples: list[PcSample] = []
    while not is_enough(samples):
        assert time.monotonic() < deadline, samples
        samples += sampler.sample(_WINDOW_S)
    return samples


def _busy_tids(target: LiveTarget, n_busy: int) -> set[int]:
    return set(list_tids(target.pid)[-n_busy:])


def test_shares_are_those_of_the_work(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "1", "0", flags=FIXED)
    heavy, light = _read_range(target.pid, "heavy"), _read_range(target.pid, "light")
    with PcSampler(target.pid, frequency_hz=2000) as sampler:
        samples = _sample_until(sampler, lambda found: sum(s.count for s in found) >= 400)
    assert 0.55 < share_within(samples, [heavy]) < 0.85
    assert 0.15 < share_within(samples, [light]) < 0.45
    assert share_within(samples, sorted([heavy, light])) > 0.95
    assert target.finish() == "ok\n"


def test_stacks_hold_return_addresses(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "1", "0", flags=FIXED)
    heavy, caller = _read_range(target.pid, "heavy"), _read_range(target.pid, "work")
    with PcSampler(target.pid, frequency_hz=2000, n_stack_words=16) as sampler:
        samples = _sample_until(sampler, lambda found: sum(s.count for s in found) >= 200)
    inside = [s for s in samples if share_within([s], [heavy])]
    returning = [s for s in inside if any(caller[0] < word <= caller[1] for word in s.stack)]
    assert all(len(sample.stack) == 16 for sample in samples)
    assert len(returning) > 0.9 * len(inside) > 0
    assert target.finish() == "ok\n"


def test_every_busy_thread_is_met_and_no_sleeping_one(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "4", "3", flags=FIXED)
    busy = _busy_tids(target, 4)
    with PcSampler(target.pid) as sampler:
        samples = _sample_until(sampler, lambda found: {s.tid for s in found} >= busy)
        assert (sampler.n_watched, sampler.n_unwatched) == (8, 0)
    ranges = sorted(_read_range(target.pid, name) for name in ("heavy", "light"))
    assert share_within([s for s in samples if s.tid in busy], ranges) > 0.9
    assert target.finish() == "ok\n"


def test_of_many_threads_the_busy_ones_are_watched(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "2", str(MAX_THREADS + 10), flags=FIXED)
    busy = _busy_tids(target, 2)
    with PcSampler(target.pid) as sampler:
        _sample_until(sampler, lambda found: {s.tid for s in found} >= busy)
        assert (sampler.n_watched, sampler.n_unwatched) == (MAX_THREADS, 13)
    assert target.finish() == "ok\n"


def test_a_process_whose_first_thread_has_exited(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "1", "0", "alone", flags=FIXED)
    target.wait_for_state("Z")
    with PcSampler(target.pid) as sampler:
        samples = _sample_until(sampler, bool)
        assert sampler.n_unwatched == 0
    assert {sample.tid for sample in samples} <= set(list_tids(target.pid)) - {target.pid}
    assert target.finish() == "ok\n"


def test_rings_are_emptied_during_a_window(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "1", "0", flags=FIXED)
    ring_capacity = mmap.PAGESIZE // RECORD_SIZE
    with PcSampler(target.pid, frequency_hz=MAX_FREQUENCY_HZ) as sampler:
        n_samples, seconds = 0, 0.1
        # On a busy machine the target needs a longer window to run for 34 ms.
        while n_samples < 2 * ring_capacity:
            assert seconds < _DEADLINE_S
            n_samples = sum(sample.count for sample in sampler.sample(seconds))
            seconds *= 2
    assert target.finish() == "ok\n"


def test_exit_during_a_window_ends_it_at_once(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "2", "2", flags=FIXED)
    assert target.process.stdin is not None
    begin = time.monotonic()
    with PcSampler(target.pid) as sampler:
        sampler.sample(0.01)
        closer = threading.Timer(0.2, target.process.stdin.close)
        closer.start()
        with pytest.raises(ProcessGone):
            sampler.sample(_DEADLINE_S)
        closer.join()
        assert time.monotonic() - begin < _DEADLINE_S / 2
        with pytest.raises(ProcessGone):  # a zombie by now
            sampler.sample(0.01)
        assert target.process.wait() == 0
        with pytest.raises(ProcessGone):
            sampler.sample(0.01)


def test_nothing_is_traced_and_nothing_stays_open(start_target: StartTarget) -> None:
    target = start_target("perf_shares", "2", "2", flags=FIXED)
    n_fds = len(os.listdir("/proc/self/fd"))
    with PcSampler(target.pid) as sampler:
        sampler.sample(0.01)
        assert read_status(target.pid).tracer_pid == 0
        assert len(os.listdir("/proc/self/fd")) > n_fds
    sampler.close()
    assert len(os.listdir("/proc/self/fd")) == n_fds
    with pytest.raises(UsageError):
        sampler.sample(0.01)
    assert target.finish() == "ok\n"
