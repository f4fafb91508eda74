# SPDX-License-Identifier: Apache-2.0
"""Controllers that are killed: which kind, and at which instant.

Most are forks of this process, in which everything is imported already, so that kills fall
on what a controller does to a program and not on its start. Such a fork tells through a
pipe where it is; some kills are aimed at the instants after that, because what matters
there takes microseconds.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import select
import signal
import time
from dataclasses import dataclass, replace
from enum import Enum
from typing import NoReturn

import optpoline
from optpoline.controller.arguments import CHANGES, Change
from optpoline.promote.policies.adaptive import AdaptivePolicy
from torture.command import start_attach
from torture.errors import TortureError

__all__ = ["Aim", "Instant", "kill_controller", "plan_kills"]

_LATEST_S = 1.5
"""Latest kill after a controller's start; by then it has done everything once at least."""

_EARLIEST_S = 1e-4
_LATEST_AFTER_STEP_S = 0.3
_EARLIEST_AFTER_STEP_S = 1e-5
_STEP_S = 20.0

_COMMAND_SHARE = 0.12
_UNIFORM_SHARE = 0.25
_LOG_SHARE = 0.18

STEPS = ("attach", "learn", "promote", "watch", "detach")

_CONFIG = optpoline.Config(
    learn_s=0.15,
    relearn_s=0.1,
    sample_s=0.008,
    sample_every_s=0.02,
    sample_every_max_s=0.05,
    overhead_ratio=100.0,
    poll_s=0.01,
    relink_after_s=0.05,
    policy=AdaptivePolicy(
        min_count=32, narrow_gain_cycles=0.05, narrow_gain_ratio=0.0, n_free_changes=1_000_000
    ),
)


class Aim(Enum):
    """How a kill is timed."""

    COMMAND = "of the command line"
    UNIFORM = "uniform"
    LOG_UNIFORM = "log-uniform"
    STEP = "after a step"


@dataclass(frozen=True, slots=True, kw_only=True)
class Instant:
    """When a controller is to be killed.

    Attributes:
        aim: How it was drawn.
        delay_s: How long after the controller's start, or after it began the step.
        step: Index into ``STEPS`` for ``Aim.STEP``.
        change: How the controller changes promoted sites.
    """

    aim: Aim
    delay_s: float
    step: int = 0
    change: Change = "swap"

    def __str__(self) -> str:
        """Say it, for a note."""
        since = f"{STEPS[self.step]} began" if self.aim is Aim.STEP else "its start"
        return f"{1e3 * self.delay_s:.2f} ms after {since} ({self.aim.value}, {self.change})"


def plan_kills(chance: random.Random, n_kills: int) -> list[Instant]:
    """Draw the instants of a run, every kind in its share and in random order.

    >>> plan = plan_kills(random.Random(1), 200)
    >>> sum(instant.aim is Aim.COMMAND for instant in plan)
    24
    """
    aims: list[Aim] = []
    for aim, share in (
        (Aim.COMMAND, _COMMAND_SHARE),
        (Aim.UNIFORM, _UNIFORM_SHARE),
        (Aim.LOG_UNIFORM, _LOG_SHARE),
    ):
        aims += [aim] * max(1, round(n_kills * share))
    aims = aims[:n_kills] + [Aim.STEP] * (n_kills - len(aims))
    chance.shuffle(aims)
    ways = itertools.cycle(CHANGES)
    return [replace(_draw(chance, aim), change=way) for aim, way in zip(aims, ways, strict=False)]


def _draw(chance: random.Random, aim: Aim) -> Instant:
    """Draw one instant."""
    match aim:
        case Aim.COMMAND | Aim.UNIFORM:
            return Instant(aim=aim, delay_s=chance.uniform(0.0, _LATEST_S))
        case Aim.LOG_UNIFORM:
            return Instant(aim=aim, delay_s=_log_uniform(chance, _EARLIEST_S, _LATEST_S))
        case Aim.STEP:
            delay_s = _log_uniform(chance, _EARLIEST_AFTER_STEP_S, _LATEST_AFTER_STEP_S)
            return Instant(aim=aim, delay_s=delay_s, step=chance.randrange(len(STEPS)))


def _log_uniform(chance: random.Random, low: float, high: float) -> float:
    """Draw a number of which every power of ten between two bounds is as likely."""
    return float(low * (high / low) ** chance.random())


def kill_controller(pid: int, instant: Instant) -> None:
    """Start a controller on a process and kill it at an instant.

    Raises:
        TortureError: if it ended by itself before.
    """
    if instant.aim is Aim.COMMAND:
        _kill_command(pid, instant)
    else:
        _kill_fork(pid, instant)


def _kill_command(pid: int, instant: Instant) -> None:
    """Kill ``optpoline attach``."""
    command = start_attach(pid, "--learn-seconds", "0.2", "--change", instant.change)
    with command:
        time.sleep(instant.delay_s)
        command.kill()
    if command.returncode != -signal.SIGKILL:
        raise TortureError(f"optpoline attach ended by itself with status {command.returncode}")


def _kill_fork(pid: int, instant: Instant) -> None:
    """Kill a fork of ours that attaches, learns, promotes, watches and detaches for ever."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        _control(pid, writer, replace(_CONFIG, change=instant.change))
    os.close(writer)
    try:
        if instant.aim is Aim.STEP:
            _wait_for_step(reader, instant.step)
        time.sleep(instant.delay_s)
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        _, status = os.waitpid(child, 0)
        words = _read_rest(reader)
        os.close(reader)
    if not os.WIFSIGNALED(status):
        raise TortureError(f"a controller ended by itself: {words}")


def _wait_for_step(reader: int, step: int) -> None:
    """Wait until the controller says that it begins a step."""
    deadline = time.monotonic() + _STEP_S
    while select.select([reader], [], [], max(0.0, deadline - time.monotonic()))[0]:
        byte = os.read(reader, 1)
        if byte in (b"", b"!"):
            return  # it failed; its status tells
        if byte == bytes([step]):
            return
    raise TortureError(f"a controller did not come to {STEPS[step]} within {_STEP_S:.0f} s")


def _read_rest(reader: int) -> str:
    """Return what a failed controller said of itself."""
    data = b""
    while piece := os.read(reader, 4096):
        data += piece
    return data.partition(b"!")[2].decode(errors="replace")


def _control(pid: int, writer: int, config: optpoline.Config) -> NoReturn:
    """Be a controller until killed; one that fails says why and ends with status 1."""
    try:
        while True:
            os.write(writer, b"\0")
            with optpoline.attach(pid, config=config) as session:
                os.write(writer, b"\1")
                session.learn()
                os.write(writer, b"\2")
                session.promote()
                os.write(writer, b"\3")
                session.watch(0.4)
                os.write(writer, b"\4")
    except BaseException as error:
        os.write(writer, b"!" + repr(error).encode())
        os._exit(1)
