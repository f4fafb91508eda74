# SPDX-License-Identifier: Apache-2.0
"""Controllers killed with SIGKILL at any instant: the program runs on, the rest is undone."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from typing import Self

import pytest

import optpoline
from optpoline.controller.counting_blocks import first_block
from optpoline.controller.linker import Linker, Move
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome
from optpoline.controller.target import Target
from optpoline.model import Addr
from optpoline.patch.layout import MAGIC
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import (
    RETPOLINE,
    VARIANTS,
    Witness,
    arena_mappings,
    read_until,
    run_json,
    start_cli,
)
from tests.unit.toolchain.conftest import build_plugin_once

pytestmark = pytest.mark.live

N_KILLS = 8

INSTANTS = (("", 0.7), ("attached: ", 0.05), ("learning ", 0.4), ("promoted ", 0.5))
"""Lines that begin a part of a session, and how long after them to kill at the latest: while
starting and attaching, linking, learning and promoting, watching and letting go."""

SESSION = ("attach", "--promote-plain", "--learn-seconds", "0.3", "--duration", "0.6")

N_POINTS = 16
"""Instants tried of all those at which a controller does something to the program."""

DIE_AT = """
import os, signal, sys
import optpoline
from optpoline.controller import first_window
from optpoline.patch.arena import Arena
from optpoline.patch.arena_memory import ArenaMemory
from optpoline.process.memory import RemoteMemory
from optpoline.process.ptrace import Tracer

n_done = n_left = 0
is_after = False

def count(owner, name):
    # Die before or after the n-th thing that is done to the program.
    function = getattr(owner, name)
    def counted(*args, **kwargs):
        global n_done
        n_done += 1
        if n_done == n_left and not is_after:
            os.kill(os.getpid(), signal.SIGKILL)
        try:
            return function(*args, **kwargs)
        finally:
            if n_done == n_left:
                os.kill(os.getpid(), signal.SIGKILL)
    setattr(owner, name, counted)

count(Tracer, "_request")
count(RemoteMemory, "write")
count(ArenaMemory, "store_u64")
count(Arena, "put_block")
count(Arena, "journal")
first_window.GROUP_SITES, first_window.MIN_LEARN_S = 2, 0.01
config = optpoline.Config(sample_every_s=0.02, poll_s=0.02, promote_plain=True)
for line in sys.stdin:
    pid, point, when = line.split()
    n_left, is_after = int(point), when == "after"
    child = os.fork()
    if child == 0:
        with optpoline.attach(int(pid), config=config) as session:
            session.learn(0.06, in_turn=True)
            session.promote()
            session.watch(0.1)
        print(n_done, end=" ", flush=True)
        os._exit(0)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""
"""Runs a session in a child for each line; the imports alone take longer than one."""


def _undo(target: LiveTarget, before: Witness, *, number: int) -> None:
    """See what was left, and undo it one way or the other, each fourth time by command line."""
    left = optpoline.read_status(target.pid)
    if left is None:
        before.check_text(target.pid)
    else:
        assert not left.controller_alive
        assert left.foreign == 0
    if number % 8 == 0:
        assert run_json("status", target.pid)["left_behind"] is not None or left is None
        options = ("-q", "--learn-seconds", "0.1", "--duration", "0.3")
        assert run_json("attach", *options, target.pid)["detach"]["outcome"] == "clean"
    elif number % 8 == 4:
        detach = run_json("detach", target.pid)["detach"]
        assert detach is None or detach["outcome"] == "clean", detach
    elif number % 2 == 0:
        optpoline.attach(target.pid).detach()
    else:
        result = optpoline.restore(target.pid)
        assert result.outcome is DetachOutcome.CLEAN, result
    before.check(target.pid)


def _kill(pid: int, line: str, delay_s: float) -> bool:
    """Start a session and kill it; tell whether it still ran."""
    with start_cli(*SESSION, pid) as controller:
        if line:
            # Without it where the machine is so busy that the session's time was up before.
            read_until(controller, line)
        time.sleep(delay_s)
        controller.kill()
    return controller.returncode == -signal.SIGKILL


@pytest.mark.timeout(180)
def test_killed_at_random_instants(start_target: StartTarget) -> None:
    seed = int(os.environ.get("OPTPOLINE_SEED", time.time_ns() % 10_000))
    print(f"OPTPOLINE_SEED={seed}")  # noqa: T201
    chance = random.Random(seed)
    n_killed = n_left = number = 0
    # Of plain sites the opcodes change as well.
    plain = ("-O2", "-pthread", f"-fplugin={build_plugin_once()}")
    variants = (*VARIANTS.values(), plain)
    for part, flags in enumerate(variants, 1):
        target = start_target("promote", "1", flags=flags)
        before = Witness.of(target.pid)
        # A session that had ended before it was killed does not count.
        while n_killed < N_KILLS * part // len(variants):
            line, latest_s = INSTANTS[number % len(INSTANTS)]
            n_killed += _kill(target.pid, line, chance.uniform(0.0, latest_s))
            n_left += optpoline.read_status(target.pid) is not None
            target.ask(str(number))
            _undo(target, before, number=number // len(INSTANTS) + number)
            number += 1
        assert target.finish().startswith("wrong 0 rounds")
    # Those killed while learning at least.
    assert n_left >= N_KILLS // 4


class Dying:
    """Runs sessions that die; leaving the ``with`` block ends it."""

    def __init__(self, target: LiveTarget) -> None:
        """Start what runs them."""
        self._target = target
        self._process = subprocess.Popen(
            [sys.executable, "-c", DIE_AT],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __enter__(self) -> Self:
        """Return it."""
        return self

    def __exit__(self, *_: object) -> None:
        """End it."""
        with self._process as process:
            process.kill()

    def die(self, point: int, when: str) -> list[int]:
        """Run one that dies at a point, 0 for none: return the status, after what it counted."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self._target.pid} {point} {when}\n")
        self._process.stdin.flush()
        return [int(number) for number in self._process.stdout.readline().split()]


@pytest.mark.timeout(180)
@pytest.mark.parametrize("mode", ["spin", "rest", "timer"])
def test_killed_at_every_kind_of_point(start_target: StartTarget, mode: str) -> None:
    target = start_target("life", mode, "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with Dying(target) as sessions:
        n_all, status = sessions.die(0, "never")
        assert status == 0
        before.check(target.pid)
        n_points = N_POINTS if mode == "spin" else N_POINTS // 3
        # All of the beginning (arena, file, mappings), then spread over the rest.
        points = sorted({*range(1, n_all, max(1, n_all // n_points))})
        for number, point in enumerate(points):
            when = "after" if number % 2 else "before"
            status = sessions.die(point, when)[-1]
            # Not every session does as much as the first.
            assert status in (-signal.SIGKILL, 0)
            target.ask("how are you")
            result = optpoline.restore(target.pid)
            assert result.outcome is DetachOutcome.CLEAN, (point, when, result)
            assert result.foreign == ()
            before.check(target.pid)
    assert target.finish().endswith("\n")


def _link_one(pid: int) -> tuple[Target, SiteRecord]:
    """Link a site of the program that holds its baseline, as a controller that dies then."""
    target = Target(pid, stop_timeout_s=2.0)
    target.refresh_modules()
    (loaded,) = (m for m in target.modules.values() if m.module.is_main)
    record = target.make_records(loaded)[0]
    record.arena.journal(record.site)
    Linker(target).link([Move(record=record, block=first_block(record))])
    assert record.home is not None
    return target, record


def test_of_two_versions(start_target: StartTarget) -> None:
    """Each undoes its own, whatever the other has left: else neither could ever."""
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    other, other_site = _link_one(target.pid)
    version = int.from_bytes(other_site.arena.read(other_site.arena.addr, 16)[8:], "little")
    other_site.arena.store_u64(Addr(other_site.arena.addr + len(MAGIC)), version + 1)
    own, own_site = _link_one(target.pid)
    assert own_site.site.addr != other_site.site.addr
    own.close()
    result = optpoline.restore(target.pid)
    assert (result.outcome, result.restored) == (DetachOutcome.INCOMPLETE, 1)
    assert "another version" in result.notes[-1]
    assert len({mapping.inode for mapping in arena_mappings(target.pid)}) == 1
    other_site.arena.store_u64(Addr(other_site.arena.addr + len(MAGIC)), version)
    other.close()
    result = optpoline.restore(target.pid)
    assert (result.outcome, result.restored) == (DetachOutcome.CLEAN, 1)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
