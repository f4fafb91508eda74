# SPDX-License-Identifier: Apache-2.0
"""Row ``kills``: controllers killed with SIGKILL at random instants, attach included.

After each kill: every thread of the target goes on and its results are right,
``optpoline status`` reads what is there, and then either a new controller takes over and
promotes, or ``detach`` undoes it; text, mappings and open files are then as they were.
"""

from __future__ import annotations

import contextlib
import random
import time
from dataclasses import dataclass, field
from pathlib import Path

import optpoline
from torture.build import build_target
from torture.command import CommandFailed, run_json
from torture.errors import TortureError
from torture.footprint import Footprint, list_changes
from torture.kill import Aim, Instant, kill_controller, plan_kills
from torture.program import NICE, Program, TargetDied
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW"]

_KILLS = 500
_COMMAND_SHARE = 0.1
_PROGRESS_S = 20.0
_CLEAN_S = 20.0
"""How long a thread may keep an arena mapped: the target's handlers block for 0.5 s."""

_RETRY_S = 0.05
_TAKEOVER = optpoline.Config(learn_s=0.1)
_UNDONE = (optpoline.DetachOutcome.CLEAN, optpoline.DetachOutcome.GONE)


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What the kills of a run came to."""

    kills: int = 0
    command_kills: int = 0
    left: int = 0
    takeovers: int = 0
    takeovers_failed: int = 0
    detaches: int = 0
    detaches_failed: int = 0
    statuses_failed: int = 0
    promoted: int = 0
    waited: int = 0
    failures: int = 0
    eintr: int = 0
    branches: int = 0
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True, slots=True, kw_only=True)
class KillsRow:
    """See the module."""

    name: str = "kills"
    about: str = "controllers killed at random instants"
    quick_s: float = 22.0
    full_s: float = 900.0

    def run(self, scale: Scale) -> Outcome:
        """See ``Row``."""
        begin_s = time.monotonic()
        n_kills = scale.of(_KILLS, least=10)
        chance = random.Random(scale.seed)
        plan = plan_kills(chance, n_kills)
        tally = _Tally()
        half = n_kills // 2
        calls = build_target("calls", "-Wl,-z,now")
        sleepers = build_target("sleepers")
        # Few threads: more of the time goes to controllers, so more kills to a minute.
        _run_on([calls, "4", "100", str(scale.seed)], plan[:half], tally)
        _run_on([sleepers, "12"], plan[half:], tally)
        return Outcome(
            row=self.name,
            scale=f"{n_kills} of {_KILLS} kills",
            figures=tuple(_figures(tally, n_kills)),
            notes=tuple(tally.notes),
            seconds=time.monotonic() - begin_s,
        )


def _run_on(command: list[str | Path], plan: list[Instant], tally: _Tally) -> None:
    """Do some of the kills on one target; one that fails is replaced by another."""
    todo = list(enumerate(plan))
    while todo:
        with Program([str(word) for word in command], nice=NICE) as target:
            before = Footprint.of(target.pid)
            instant: Instant | None = None
            try:
                while todo:
                    number, instant = todo.pop(0)
                    _kill_and_undo(target, before, instant, number, tally)
                instant = None
                counts = target.ask_numbers("counts")
                tally.eintr += counts.get("eintr", 0)
                tally.branches += counts["branches"]
                target.finish()
            except TargetDied as death:
                tally.failures += 1
                tally.notes.append(f"killed {instant}: {death}" if instant else str(death))


def _kill_and_undo(
    target: Program, before: Footprint, instant: Instant, number: int, tally: _Tally
) -> None:
    """Do one kill and everything that has to work after it.

    Raises:
        TargetDied: if the target failed.
    """
    kill_controller(target.pid, instant)
    tally.kills += 1
    tally.command_kills += instant.aim is Aim.COMMAND
    _check_goes_on(target)
    by_command = number % 10 in (3, 6)
    try:
        document = run_json("status", str(target.pid))
        tally.left += document["left_behind"] is not None
    except CommandFailed as error:
        tally.statuses_failed += 1
        tally.notes.append(f"killed {instant}: {error}")
    if number % 2 == 0:
        _take_over(target, instant, by_command, tally)
    else:
        _detach(target, instant, by_command, tally)
    tally.waited += _wait_until_clean(target.pid)
    changes = list_changes(before, Footprint.of(target.pid))
    if changes:
        tally.failures += 1
        tally.notes.append(f"killed {instant}, undone: {'; '.join(changes)}")
    _check_goes_on(target)


def _check_goes_on(target: Program) -> None:
    """Check that every thread does its work and that all results are right.

    Raises:
        TargetDied: if not.
    """
    counts = target.ask_numbers("mark")
    deadline = time.monotonic() + _PROGRESS_S
    while (counts := target.ask_numbers("counts"))["idle"]:
        if time.monotonic() > deadline:
            raise TargetDied(f"{counts['idle']} threads did nothing for {_PROGRESS_S:.0f} s")
        time.sleep(0.005)
    if counts["wrong"]:
        raise TargetDied(f"{counts['wrong']} wrong results")


def _take_over(target: Program, instant: Instant, by_command: bool, tally: _Tally) -> None:
    """Attach, promote, let go: as if nothing had been there."""
    tally.takeovers += 1
    try:
        if by_command:
            options = ("--quiet", "--learn-seconds", "0.1", "--duration", "1")
            document = run_json("attach", *options, str(target.pid))
            promoted = document["promoted"]
            n_promoted = promoted if isinstance(promoted, int) else 0
        else:
            with optpoline.attach(target.pid, config=_TAKEOVER) as session:
                deadline = time.monotonic() + _PROGRESS_S
                n_promoted = 0
                # The target may not have run in a window: others want the machine too.
                while not n_promoted and time.monotonic() < deadline:
                    session.learn()
                    n_promoted = session.promote()
        tally.promoted += n_promoted
        if n_promoted == 0:
            raise TortureError("nothing was promoted")
    except (TortureError, optpoline.OptpolineError) as error:
        tally.takeovers_failed += 1
        tally.notes.append(f"killed {instant}, takeover: {error}")


def _detach(target: Program, instant: Instant, by_command: bool, tally: _Tally) -> None:
    """Undo what is left."""
    tally.detaches += 1
    try:
        if by_command:
            run_json("detach", str(target.pid))
        else:
            optpoline.restore(target.pid)
    except (TortureError, optpoline.OptpolineError) as error:
        tally.detaches_failed += 1
        tally.notes.append(f"killed {instant}, detach: {error}")


def _wait_until_clean(pid: int) -> bool:
    """Undo again while a thread kept an arena mapped; tell whether that was so."""
    deadline = time.monotonic() + _CLEAN_S
    has_waited = False
    while time.monotonic() < deadline:
        with contextlib.suppress(optpoline.OptpolineError):
            if optpoline.read_status(pid) is None:
                break
            has_waited = True
            if optpoline.restore(pid).outcome in _UNDONE:
                break
        time.sleep(_RETRY_S)
    return has_waited


def _figures(tally: _Tally, n_kills: int) -> list[Figure]:
    """Hold what was reached against the bars."""

    def zero(name: str, value: int, of: int) -> Figure:
        return Figure(name=name, value=f"{value} of {of}", bar="0", is_met=value == 0)

    by_command = int(_COMMAND_SHARE * n_kills)
    return [
        Figure(
            name="kills",
            value=str(tally.kills),
            bar=f"≥ {n_kills}",
            is_met=tally.kills >= n_kills,
        ),
        Figure(
            name="of the command line",
            value=str(tally.command_kills),
            bar=f"≥ {by_command}",
            is_met=tally.command_kills >= by_command,
        ),
        zero("target failures", tally.failures, tally.kills),
        zero("status failed", tally.statuses_failed, tally.kills),
        zero("takeovers failed", tally.takeovers_failed, tally.takeovers),
        zero("detaches failed", tally.detaches_failed, tally.detaches),
        _reported("kills that left something", tally.left),
        _reported("sites promoted in takeovers", tally.promoted),
        _reported("arenas that a thread kept for a while", tally.waited),
        _reported("EINTR seen by sleepers", tally.eintr),
        _reported("indirect branches checked", tally.branches),
    ]


def _reported(name: str, value: int) -> Figure:
    """Return a figure that has no bar."""
    return Figure(name=name, value=f"{value:,}", bar="", is_met=None)


ROW = KillsRow()
