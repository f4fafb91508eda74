# SPDX-License-Identifier: Apache-2.0
"""What keeps an arena mapped is told as it is."""

from __future__ import annotations

from collections.abc import Collection
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller.letting_go import unmap_when_quiescent
from optpoline.controller.target import Target
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.patch.grace import Look, ThreadKey
from optpoline.patch.ranges import AddressRanges

START, END = Addr(0x7000_0000), Addr(0x7000_4000)


class NoMemory:
    """The memory of a program whose arena cannot be read."""

    def read(self, addr: int, size: int) -> bytes:
        raise TargetFault(addr, size, "read")


class NobodyInside:
    """An observer of a program whose threads are all outside."""

    def __init__(self, pointed_to: frozenset[int] | None) -> None:
        """Find these addresses in memory, or None of too much."""
        self.pointed_to = pointed_to
        self.n_searches = 0

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        return Look(quiescent=frozenset({(1, 1)}), threads=frozenset({(1, 1)}))

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        raise AssertionError("nobody has to be stopped")

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        self.n_searches += 1
        return self.pointed_to

    def is_switching(self) -> bool:
        return False

    def suspect_switching(self) -> None:
        raise AssertionError("nobody holds anything")


@pytest.mark.parametrize(
    ("pointed_to", "n_searches", "words"),
    [
        (None, 1, "the program has too much memory to search it for saved PCs"),
        (frozenset({START + 16}), 20, "memory of the program holds an address in it"),
    ],
)
def test_arena_that_stays_says_why(
    pointed_to: frozenset[int] | None,
    n_searches: int,
    words: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    observer = NobodyInside(pointed_to)
    monkeypatch.setattr("optpoline.controller.letting_go.ThreadObserver", lambda _: observer)
    monkeypatch.setattr("optpoline.controller.letting_go.TRY_EVERY_S", 0.0)
    namespace = SimpleNamespace(pid=1, memory=NoMemory(), read_maps=None, stop=None, sharers=None)
    target = cast(Target, namespace)
    (note,) = unmap_when_quiescent(target, [(START, END)], [(START, END)])
    assert note.startswith(f"the arena at {START:#x} stays mapped: {words}")
    assert observer.n_searches == n_searches
