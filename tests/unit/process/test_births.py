# SPDX-License-Identifier: Apache-2.0
"""Who is new since the last look: real forks, and numbers that go round in a made-up /proc."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass

import pytest

from optpoline.process import births
from optpoline.process.births import BirthWatch, count_forks


def _fork() -> int:
    """Fork a child that sleeps until it is killed."""
    pid = os.fork()
    if pid == 0:
        try:
            while True:
                signal.pause()
        finally:
            os._exit(1)
    return pid


def test_all_are_new_at_first_and_a_child_is_later() -> None:
    watch = BirthWatch()
    first = watch.list_new()
    assert os.getpid() in first
    n_forks = count_forks()
    child = _fork()
    try:
        assert count_forks() > n_forks
        assert not watch.is_current
        assert child in watch.list_new()
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


@dataclass
class World:
    """A machine: its count of forks, the last number handed out, who lives, and the time."""

    n_forks: int = 0
    last_pid: int = 20
    pids: tuple[int, ...] = (10, 20)
    now_s: float = 9.0


@pytest.fixture
def world(monkeypatch: pytest.MonkeyPatch) -> World:
    """Return one that is looked at in place of ours."""
    world = World()
    monkeypatch.setattr(births, "count_forks", lambda: world.n_forks)
    monkeypatch.setattr(births, "_read_last_pid", lambda: world.last_pid)
    monkeypatch.setattr(os, "listdir", lambda _: [*map(str, world.pids), "self"])
    monkeypatch.setattr(time, "monotonic", lambda: world.now_s)
    return world


@pytest.mark.parametrize(
    ("pids", "last", "new"),
    [
        ((10, 20, 21, 22), 22, (21, 22)),
        ((10, 20), 22, ()),  # it is gone already
        ((5, 10, 20), 5, (5,)),  # once round
        ((5, 10, 20), 12, (5, 10)),  # the same, and 10 is another one by now
        ((10, 19, 20), 21, (19,)),  # its number was handed out before, its fork took long
    ],
)
def test_those_are_new_who_were_not_there_or_have_a_number_used_again(
    world: World, pids: tuple[int, ...], last: int, new: tuple[int, ...]
) -> None:
    watch = BirthWatch()
    assert watch.list_new() == (10, 20)
    assert watch.list_new() == ()
    world.n_forks, world.last_pid, world.pids = 1, last, pids
    assert watch.list_new() == new
    assert watch.list_new() == ()


def test_after_a_while_all_are_new(world: World) -> None:
    watch = BirthWatch()
    watch.list_new()
    world.now_s = 19.0
    assert watch.list_new() == ()  # nothing was forked
    world.n_forks = 1
    assert watch.list_new() == (10, 20)


def test_after_many_forks_all_are_new(world: World) -> None:
    watch = BirthWatch()
    watch.list_new()
    world.n_forks = 1_000
    assert watch.list_new() == (10, 20)
