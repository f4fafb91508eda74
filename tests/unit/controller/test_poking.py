# SPDX-License-Identifier: Apache-2.0
"""Which stops are made for a batch of sites, and which are not because they would be in vain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller import poking as module
from optpoline.controller.pace import FIRST_BATCH_SIZE, Pace
from optpoline.controller.poking import MAX_TRIES, poke_in_stops, poke_patiently
from optpoline.controller.target import Target
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import Poke, needs_all_stopped
from optpoline.process.stop import Wake

BASE = 0x4F00_1000
CODE = bytes.fromhex("e8 fb ef ff ff")
NEW = bytes.fromhex("11 22 33 44")
_LINE_SIZE = 64
EASY_OFF, CROSSING_OFF = 16, 61


class Text:
    """Sites in cache lines of their own, all with the same bytes."""

    def __init__(self, n_lines: int) -> None:
        """Write them."""
        self.data = bytearray(b"\x90" * (_LINE_SIZE * n_lines + len(CODE)))

    def place(self, off: int) -> Poke:
        """Put a site there, and return what is to be done to it."""
        self.data[off : off + len(CODE)] = CODE
        entry = JournalEntry(addr=Addr(BASE + off), code=CODE, disp_off=1)
        return Poke(entry=entry, expected=CODE[1:], new=NEW)

    def read(self, addr: int, size: int) -> bytes:
        """Read."""
        return bytes(self.data[addr - BASE :][:size])

    def write(self, addr: int, data: bytes) -> None:
        """Write."""
        self.data[addr - BASE : addr - BASE + len(data)] = data


class Program:
    """A program as far as poking needs it.

    Attributes:
        may_wake: Answers to whether all may be woken, the last one for ever.
        asleep: Who sleeps on in a stop of all threads.
        pcs: Where threads stand.
        stops: Who was woken in each stop.
        delays: With which leave to delay it was asked.
    """

    def __init__(self, n_lines: int, *, may_wake: Sequence[bool] = (True,)) -> None:
        """Start it."""
        self.memory = Text(n_lines)
        self.pace = Pace(max_ns=5_000_000)
        self.may_wake = list(may_wake)
        self.asleep: tuple[int, ...] = ()
        self.pcs: Sequence[int] = ()
        self.stops: list[Wake] = []
        self.delays: list[bool] = []

    def may_wake_all(self, *, may_delay: bool = False) -> bool:
        """Tell whether nobody sleeps who must not be woken."""
        self.delays.append(may_delay)
        return self.may_wake.pop(0) if len(self.may_wake) > 1 else self.may_wake[0]

    @contextmanager
    def stop(self, wake: Wake = Wake.NONE) -> Iterator[SimpleNamespace]:
        """Note a stop."""
        self.stops.append(wake)
        threads = tuple(SimpleNamespace(tid=9, pc=Addr(pc)) for pc in self.pcs)
        yield SimpleNamespace(asleep=self.asleep, stopped=threads, duration_ns=0)


def place_all(program: Program, n_lines: int) -> tuple[list[Poke], list[Poke]]:
    """Return sites that lie in a line each, and sites that lie in two."""
    starts = range(0, _LINE_SIZE * n_lines, _LINE_SIZE)
    easy = [program.memory.place(start + EASY_OFF) for start in starts]
    crossing = [program.memory.place(start + CROSSING_OFF) for start in starts]
    assert not any(needs_all_stopped(poke.entry) for poke in easy)
    assert all(needs_all_stopped(poke.entry) for poke in crossing)
    return easy, crossing


def test_no_stop_that_would_only_find_the_sleeper() -> None:
    program = Program(3, may_wake=[False])
    easy, crossing = place_all(program, 3)
    poked = poke_in_stops(cast(Target, program), [*crossing, *easy])
    assert (poked.done, poked.left) == (tuple(easy), tuple(crossing))
    assert program.stops == [Wake.NONE]


def test_somebody_falls_asleep_between_two_stops() -> None:
    n_lines = FIRST_BATCH_SIZE + 2
    program = Program(n_lines, may_wake=[True, False])
    _, crossing = place_all(program, n_lines)
    poked = poke_in_stops(cast(Target, program), crossing)
    assert poked.done == tuple(crossing[:FIRST_BATCH_SIZE])
    assert poked.left == tuple(crossing[FIRST_BATCH_SIZE:])
    assert program.stops == [Wake.ALL]


def test_somebody_falls_asleep_before_the_stop() -> None:
    program = Program(3)
    program.asleep = (7,)
    _, crossing = place_all(program, 3)
    poked = poke_in_stops(cast(Target, program), crossing)
    assert (poked.done, poked.left) == ((), tuple(crossing))
    assert program.stops == [Wake.ALL]


def test_who_stands_inside_a_site_goes_on_first() -> None:
    program = Program(3)
    _, crossing = place_all(program, 3)
    first, second, third = crossing
    # At its first byte, inside, and behind it.
    program.pcs = (first.entry.addr, second.entry.addr + 1, third.entry.end)
    poked = poke_in_stops(cast(Target, program), [third, second, first])
    assert (poked.done, poked.left) == ((third, first), (second,))
    assert program.memory.read(second.entry.addr, len(CODE)) == CODE


def test_trying_patiently_stops_nobody_in_vain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "TRY_EVERY_S", 0.0)
    program = Program(2, may_wake=[False])
    easy, crossing = place_all(program, 2)
    poked = poke_patiently(cast(Target, program), [*easy, *crossing])
    assert (poked.done, poked.left) == (tuple(easy), tuple(crossing))
    assert program.stops == [Wake.NONE]
    # Only the last try may let timeouts begin again.
    assert program.delays == [False] * MAX_TRIES + [True]
    program.may_wake = [False, False, True]
    assert poke_patiently(cast(Target, program), crossing).done == tuple(crossing)
    assert program.stops == [Wake.NONE, Wake.ALL]
