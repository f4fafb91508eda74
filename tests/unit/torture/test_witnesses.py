# SPDX-License-Identifier: Apache-2.0
"""What rows rely on to see a failure: footprints, started programs, the draw of instants."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Callable
from dataclasses import replace

import pytest

from torture.errors import TortureError
from torture.footprint import Footprint, list_changes
from torture.kill import Aim, plan_kills
from torture.program import Program, TargetDied

BEFORE = Footprint(
    text={(0x1000, 0x2000, "/bin/a"): "00"},
    n_arenas=0,
    n_mappings=9,
    vm_kib=100,
    rss_kib=10,
    fds={0: "/dev/null"},
)


@pytest.mark.parametrize(
    ("after", "word"),
    [
        (replace(BEFORE, text={(0x1000, 0x2000, "/bin/a"): "01"}), "text of /bin/a at 0x1000"),
        (replace(BEFORE, text={}), "came or went"),
        (replace(BEFORE, n_arenas=3), "3 mappings of an arena"),
        (replace(BEFORE, n_mappings=10), "9 mappings became 10"),
        (replace(BEFORE, vm_kib=104), "100 KiB became 104 KiB"),
        (replace(BEFORE, fds={}), "open files"),
    ],
)
def test_every_change_is_told(after: Footprint, word: str) -> None:
    changes = list_changes(BEFORE, after)
    assert len(changes) == 1
    assert word in changes[0]


def test_no_change_is_none() -> None:
    assert list_changes(BEFORE, replace(BEFORE, rss_kib=11)) == []


def test_footprint_of_a_process() -> None:
    with Program(["sh", "-c", "echo ready; cat"]) as program:
        before = Footprint.of(program.pid)
        assert before.text
        assert all(len(digest) == 64 for digest in before.text.values())
        assert {0, 1, 2} <= before.fds.keys()
        assert before.vm_kib >= before.rss_kib > 0
        assert list_changes(before, Footprint.of(program.pid)) == []
    with pytest.raises(TortureError, match="cannot be looked at"):
        Footprint.of(program.pid)


def test_a_program_is_asked() -> None:
    with Program(["sh", "-c", "echo ready; cat"]) as program:
        assert program.ask("hello") == "hello"
        assert program.ask_numbers("a=1 b=22") == {"a": 1, "b": 22}
        with pytest.raises(TargetDied, match="answered 'nonsense'"):
            program.ask_numbers("nonsense")
        assert program.is_alive()
        program.finish()
        assert not program.is_alive()


def kill_it(program: Program) -> None:
    os.kill(program.pid, signal.SIGTRAP)
    program.ask("hello")


def end_it(program: Program) -> None:
    program.finish()


@pytest.mark.parametrize(
    ("script", "act", "number", "word"),
    [
        ("echo ready; read x; kill -TRAP $$", kill_it, signal.SIGTRAP, "SIGTRAP"),
        ("echo ready; cat; echo oh >&2; exit 3", end_it, None, "status 3: oh"),
    ],
)
def test_a_death_is_told(
    script: str, act: Callable[[Program], None], number: int | None, word: str
) -> None:
    with Program(["sh", "-c", script]) as program:
        with pytest.raises(TargetDied, match=word) as death:
            act(program)
        assert death.value.signal == number


def test_a_program_that_is_not_ready_is_refused() -> None:
    with pytest.raises(TortureError, match="not that it is ready"):
        Program(["sh", "-c", "echo never; cat"])


def test_plans_are_drawn_from_the_seed() -> None:
    plan = plan_kills(random.Random(3), 500)
    assert plan == plan_kills(random.Random(3), 500)
    assert plan != plan_kills(random.Random(4), 500)
    shares = {aim: sum(instant.aim is aim for instant in plan) for aim in Aim}
    assert shares[Aim.COMMAND] >= 50
    assert min(shares.values()) >= 50
    assert {instant.step for instant in plan} == {0, 1, 2, 3, 4}
    assert all(0 <= instant.delay_s <= 1.5 for instant in plan)


@pytest.mark.parametrize("n_kills", [1, 3, 10, 12])
def test_short_plans_have_the_length_asked_for(n_kills: int) -> None:
    plan = plan_kills(random.Random(3), n_kills)
    assert len(plan) == n_kills
    assert any(instant.aim is Aim.COMMAND for instant in plan)
