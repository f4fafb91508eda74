# SPDX-License-Identifier: Apache-2.0
"""Row ``cycles``: attach, learn, promote, detach, over and over on one target.

Some cycles let go right after attaching, some right after learning, some in the middle of
it, some after a while of keeping up; a tenth are done by the command line. After each, the
target's text, mappings, address space and open files are as they were before the first.
"""

from __future__ import annotations

import random
import signal
import threading
import time
from dataclasses import dataclass, field
from enum import Enum

import optpoline
from torture.build import build_target
from torture.command import CommandFailed, run_json, start_attach
from torture.footprint import Footprint, list_changes
from torture.program import NICE, Program, TargetDied
from torture.row import Figure, Outcome, Scale
from torture.rows.calls import churn_config

__all__ = ["ROW"]

_CYCLES = 2000
_COMMAND_CYCLES = 200
_THREADS = 4
_LEARN_S = 0.03
_WATCH_S = 0.1
_SETTLE_CYCLES = 3
"""Cycles before resident memory is first taken: what a program touches once, it keeps."""

_RSS_NOISE_KIB = 256
"""The target's stacks and buffers may touch a few pages more; a leak of a page a cycle
shows above this after 64 cycles, a leaked mapping at once in the address space."""

_END_S = 30.0


class _Kind(Enum):
    """How far a cycle goes before it lets go."""

    ATTACHED = "after attaching"
    IN_LEARNING = "in mid-learning"
    LEARNED = "after learning"
    PROMOTED = "after promoting"
    WATCHED = "after keeping up"


_WEIGHTS = {
    _Kind.ATTACHED: 1,
    _Kind.IN_LEARNING: 2,
    _Kind.LEARNED: 3,
    _Kind.PROMOTED: 3,
    _Kind.WATCHED: 2,
}


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What the cycles of a run came to."""

    done: int = 0
    command: int = 0
    changed: int = 0
    failed: int = 0
    death: TargetDied | None = None
    promoted: int = 0
    rss_first_kib: int = 0
    rss_last_kib: int = 0
    kinds: dict[_Kind, int] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    counts: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class CyclesRow:
    """See the module."""

    name: str = "cycles"
    about: str = "attach, learn, promote and detach cycles on one target"
    quick_s: float = 16.0
    full_s: float = 800.0

    def run(self, scale: Scale) -> Outcome:
        """See ``Row``."""
        begin_s = time.monotonic()
        n_cycles = scale.of(_CYCLES, least=10)
        n_command = scale.of(_COMMAND_CYCLES, least=2)
        chance = random.Random(scale.seed)
        by_command = set(chance.sample(range(n_cycles), n_command))
        kinds = chance.choices(list(_WEIGHTS), list(_WEIGHTS.values()), k=n_cycles)
        tally = _Tally()
        # No signals here: a handler may hold an arena, and this row counts mappings.
        program = build_target("calls", "-Wl,-z,now")
        with Program([str(program), str(_THREADS), "0", str(scale.seed)], nice=NICE) as target:
            target.ask("counts")
            before = Footprint.of(target.pid)
            try:
                for number, kind in enumerate(kinds):
                    _do_cycle(target, before, kind, chance, number in by_command, tally)
                tally.counts = target.ask_numbers("counts")
                target.finish()
            except TargetDied as death:
                tally.death = death
                tally.notes.append(str(death))
        return Outcome(
            row=self.name,
            scale=f"{n_cycles:,} of {_CYCLES:,} cycles, {n_command} by command line",
            figures=tuple(_figures(tally, n_cycles, n_command)),
            notes=tuple(tally.notes),
            seconds=time.monotonic() - begin_s,
        )


def _do_cycle(
    target: Program,
    before: Footprint,
    kind: _Kind,
    chance: random.Random,
    by_command: bool,
    tally: _Tally,
) -> None:
    """Do one cycle and look at what it left.

    Raises:
        TargetDied: if the target failed.
    """
    try:
        if by_command:
            tally.promoted += _cycle_by_command(target.pid, kind, chance)
        else:
            tally.promoted += _cycle_by_session(target.pid, kind, chance, tally)
    except (CommandFailed, optpoline.OptpolineError) as error:
        tally.failed += 1
        tally.notes.append(f"cycle {tally.done + 1}, {kind.value}: {error}")
    tally.done += 1
    tally.command += by_command
    tally.kinds[kind] = tally.kinds.get(kind, 0) + 1
    counts = target.ask_numbers("counts")
    if counts["wrong"]:
        raise TargetDied(f"{counts['wrong']} wrong results after cycle {tally.done}")
    after = Footprint.of(target.pid)
    tally.rss_last_kib = after.rss_kib
    if tally.done <= _SETTLE_CYCLES:
        tally.rss_first_kib = after.rss_kib
    if changes := list_changes(before, after):
        tally.changed += 1
        tally.notes.append(f"cycle {tally.done}, {kind.value}: {'; '.join(changes)}")


def _cycle_by_session(pid: int, kind: _Kind, chance: random.Random, tally: _Tally) -> int:
    """Do one cycle through the API; return how many sites were promoted."""
    with optpoline.attach(pid, config=churn_config()) as session:
        n_promoted = _do_session(session, kind, chance)
        result = session.detach()
    if result.outcome is not optpoline.DetachOutcome.CLEAN:
        tally.notes += [f"cycle {tally.done + 1}: {note}" for note in result.notes]
    return n_promoted


def _do_session(session: optpoline.Session, kind: _Kind, chance: random.Random) -> int:
    """Go as far as a kind of cycle goes; return how many sites were promoted."""
    n_promoted = 0
    if kind is _Kind.ATTACHED:
        return 0
    if kind is _Kind.IN_LEARNING:
        stop = threading.Event()
        timer = threading.Timer(chance.uniform(0.0, _LEARN_S), stop.set)
        timer.start()
        session.learn(1.0, stop)
        timer.join()
        return 0
    session.learn(_LEARN_S)
    if kind is not _Kind.LEARNED:
        n_promoted = session.promote()
    if kind is _Kind.WATCHED:
        session.watch(_WATCH_S)
    return n_promoted


def _cycle_by_command(pid: int, kind: _Kind, chance: random.Random) -> int:
    """Do one cycle by command line; return how many sites were promoted.

    Raises:
        CommandFailed: if the command did not end well.
    """
    if kind in (_Kind.PROMOTED, _Kind.WATCHED):
        seconds = "0.05" if kind is _Kind.PROMOTED else "0.3"
        options = ("--quiet", "--learn-seconds", "0.03", "--duration", seconds)
        promoted = run_json("attach", *options, str(pid))["promoted"]
        return promoted if isinstance(promoted, int) else 0
    # Ctrl-C somewhere in a learning window that would be long.
    with start_attach(pid, "--learn-seconds", "30") as command:
        _wait_for_arena(pid, command.pid)
        time.sleep(chance.uniform(0.0, 0.1))
        command.send_signal(signal.SIGINT)
        status = command.wait(timeout=_END_S)
    if status != 0:
        raise CommandFailed(f"optpoline attach ended with status {status} on Ctrl-C")
    return 0


def _wait_for_arena(pid: int, command_pid: int) -> None:
    """Wait until a controller has begun to change a process."""
    deadline = time.monotonic() + _END_S
    while Footprint.of(pid).n_arenas == 0:
        if time.monotonic() > deadline:
            raise CommandFailed(f"optpoline, process {command_pid}, does not attach")
        time.sleep(0.01)


def _figures(tally: _Tally, n_cycles: int, n_command: int) -> list[Figure]:
    """Hold what was reached against the bars."""

    def zero(name: str, value: int) -> Figure:
        return Figure(name=name, value=str(value), bar="0", is_met=value == 0)

    grown_kib = tally.rss_last_kib - tally.rss_first_kib
    figures = [
        Figure(
            name="cycles",
            value=f"{tally.done:,}",
            bar=f"≥ {n_cycles:,}",
            is_met=tally.done >= n_cycles,
        ),
        Figure(
            name="by command line",
            value=str(tally.command),
            bar=f"≥ {n_command}",
            is_met=tally.command >= n_command,
        ),
        zero("cycles that changed text, mappings, address space, files", tally.changed),
        zero("cycles that failed", tally.failed),
        zero("wrong results", tally.counts.get("wrong", 0)),
        zero("target failures", int(tally.death is not None)),
        Figure(
            name="growth of resident memory",
            value=f"{grown_kib} KiB",
            bar=f"≤ {_RSS_NOISE_KIB} KiB",
            is_met=grown_kib <= _RSS_NOISE_KIB,
        ),
        Figure(
            name="sites promoted", value=f"{tally.promoted:,}", bar="≥ 1", is_met=tally.promoted > 0
        ),
    ]
    return figures + [
        Figure(
            name=f"let go {kind.value}", value=str(tally.kinds.get(kind, 0)), bar="", is_met=None
        )
        for kind in _Kind
    ]


ROW = CyclesRow()
