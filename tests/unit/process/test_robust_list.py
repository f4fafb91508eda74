# SPDX-License-Identifier: Apache-2.0
"""Threads that sleep are believed to be like those that stand only if they look so."""

from __future__ import annotations

import threading

import pytest

from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.process.robust_list import are_made_alike, read_robust_list
from optpoline.process.rseq import RseqRegistration

PID = 100
POINTERS = {101: 0x7F00_0000_0740, 102: 0x7F00_1000_0740, 103: 0x7F00_2000_0740}
DISTANCE = 0x2E0


class Words:
    """Memory in which every thread pointer points to itself."""

    def read(self, addr: int, size: int) -> bytes:
        """Return the word at one."""
        if addr not in POINTERS.values():
            raise TargetFault(Addr(addr), size)
        return addr.to_bytes(8, "little")


def standing(*tids: int, area_addr: int = 1) -> list[RseqRegistration]:
    """Return threads that stand."""
    return [
        RseqRegistration(tid=tid, thread_pointer=POINTERS[tid], area_addr=area_addr, signature=0)
        for tid in tids
    ]


def is_believed(stopped: list[RseqRegistration], lists: dict[int, int | None]) -> bool:
    """Ask about two threads that sleep, of which one has a list as those that stand."""
    known = {tid: pointer + DISTANCE for tid, pointer in POINTERS.items()} | lists
    return are_made_alike(stopped, [(PID, 102), (PID, 103)], Words(), known.__getitem__)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        (POINTERS[103] + DISTANCE, True),
        (POINTERS[103] + DISTANCE + 8, False),
        (0x1000, False),
        (None, True),  # gone by now
    ],
)
def test_where_the_list_begins(head: int | None, expected: bool) -> None:
    assert is_believed(standing(101), {103: head}) is expected


def test_no_list(monkeypatch: pytest.MonkeyPatch) -> None:
    for state, expected in (("S", False), ("Z", True)):
        monkeypatch.setattr(
            "optpoline.process.robust_list.read_state_char", lambda *_, found=state: found
        )
        assert is_believed(standing(101), {103: 0}) is expected


def test_nobody_to_compare_with() -> None:
    assert not is_believed(standing(101), {101: 0})
    assert not is_believed(standing(101, area_addr=0), {})
    assert are_made_alike(standing(101), [], Words(), {101: 0}.__getitem__)


def test_own_threads() -> None:
    """The C library of the tests keeps them at one distance from the thread."""
    heads: list[int | None] = [read_robust_list(threading.get_native_id())]
    thread = threading.Thread(
        target=lambda: heads.append(read_robust_list(threading.get_native_id()))
    )
    thread.start()
    thread.join()
    assert all(heads)
    assert len(set(heads)) == 2
    assert read_robust_list(1 << 22) is None
