# SPDX-License-Identifier: Apache-2.0
"""The lock keeps a second controller out, and says who holds it."""

from __future__ import annotations

import mmap
import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from optpoline.controller.lock import ControllerLock, find_controller
from optpoline.errors import ControllerActive
from optpoline.patch.layout import ARENA_NAME, HEADER_SIZE, ArenaHeader
from optpoline.process.procfs import read_start_time

PID = os.getpid()


@contextmanager
def arena_of(*, target_pid: int = PID, start: int | None = None) -> Iterator[None]:
    """Map an arena without sites into this process, made by this process for another."""
    header = ArenaHeader(
        size=5 * HEADER_SIZE,
        block_off=HEADER_SIZE,
        code_off=2 * HEADER_SIZE,
        literal_off=3 * HEADER_SIZE,
        counter_off=4 * HEADER_SIZE,
        controller_pid=PID,
        controller_start=read_start_time(PID) if start is None else start,
        target_pid=target_pid,
        n_entries=0,
        row_shift=12,
        n_cpus=0,
    )
    fd = os.memfd_create(ARENA_NAME)
    try:
        os.ftruncate(fd, header.size)
        os.pwrite(fd, header.pack(), 0)
        with mmap.mmap(fd, header.size, prot=mmap.PROT_READ):
            yield
    finally:
        os.close(fd)


def test_nobody_works_on_a_process_without_arenas() -> None:
    assert find_controller(PID) is None


def test_controller_is_found_in_the_header() -> None:
    with arena_of():
        assert find_controller(PID) == PID


def test_controller_that_let_go_or_died_does_not_work_any_more() -> None:
    for start in (0, read_start_time(PID) + 1):
        with arena_of(start=start):
            assert find_controller(PID) is None


def test_nobody_works_on_a_forked_child() -> None:
    with arena_of(target_pid=PID + 1):
        assert find_controller(PID) is None


def test_a_process_that_is_gone_has_no_controller() -> None:
    assert find_controller(1 << 22) is None


def test_second_controller_is_refused_until_the_first_releases() -> None:
    first = ControllerLock(PID)
    try:
        with pytest.raises(ControllerActive) as caught:
            ControllerLock(PID)
    finally:
        first.release()
    assert caught.value.message == f"another optpoline controller works on process {PID}"
    ControllerLock(PID).release()


def test_refusal_names_the_other_controller() -> None:
    first = ControllerLock(PID)
    try:
        with arena_of(), pytest.raises(ControllerActive) as caught:
            ControllerLock(PID)
    finally:
        first.release()
    assert f"another optpoline controller, process {PID}, works on" in caught.value.message
    assert caught.value.hint == f"end that one first (kill {PID})"
