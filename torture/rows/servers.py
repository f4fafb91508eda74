# SPDX-License-Identifier: Apache-2.0
"""Redis and nginx under load, attached to and detached from every second.

The load comes from redis-benchmark and wrk, over the loopback interface; what they call an
error is a failed request. Beside them a client of our own asks for what it knows, once a
second, and after the last detach the server's text is compared with what it was before.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass

from bench.build import Variant
from bench.errors import BenchError
from bench.programs.redis import RedisServer, build_redis
from optpoline import Config, DetachOutcome, attach
from optpoline.errors import ArenaError, StopTimeout, UnsupportedTarget
from tests.live.witness import Witness, arena_mappings
from torture.errors import MissingTool
from torture.loads import Load, Loaded, RedisBenchmark, Wrk, ask_nginx, ask_redis
from torture.nginx import Nginx, build_nginx
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW", "ServersRow"]

_FULL_CYCLES = 60
_CYCLE_S = 1.0
_CONFIG = Config(learn_s=0.25, relearn_s=0.1)
_WATCH_S = 0.3
_MORE_LOAD_S = 3.0
"""The load goes on for so long after the last detach."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What one server went through."""

    load: Loaded
    n_cycles: int
    n_clean: int
    n_promoted: int
    n_asked: int
    n_wrong: int
    n_changed: int
    n_arenas: int
    longest_ms: float
    notes: tuple[str, ...]


def _torment(pid: int, n_cycles: int, load: Load, ask: Callable[[], bool]) -> _Seen:
    """Attach to a server under load every second."""
    witness = Witness.of(pid)
    n_clean = n_promoted = n_wrong = n_asked = 0
    longest_ms = 0.0
    notes: list[str] = []
    load.start(n_cycles * _CYCLE_S + _MORE_LOAD_S)
    begin_s = time.monotonic()
    for cycle in range(n_cycles):
        time.sleep(max(0.0, begin_s + cycle * _CYCLE_S - time.monotonic()))
        try:
            session = attach(pid, config=_CONFIG)
            try:
                session.learn()
                n_promoted += session.promote()
                n_asked += 1
                n_wrong += not ask()
                session.watch(_WATCH_S)
            finally:
                result = session.detach()
            longest_ms = max(longest_ms, session.summary().stop_ms_max)
            if result.outcome is DetachOutcome.CLEAN:
                n_clean += 1
            else:
                notes.append(f"detach: {result.outcome.value}: {' '.join(result.notes)}")
        except (ArenaError, StopTimeout, UnsupportedTarget) as error:
            notes.append(f"attach: {error}")
    loaded = load.finish()
    n_asked += 1
    n_wrong += not ask()
    return _Seen(
        load=loaded,
        n_cycles=n_cycles,
        n_clean=n_clean,
        n_promoted=n_promoted,
        n_asked=n_asked,
        n_wrong=n_wrong,
        n_changed=len(witness.changed_bytes(pid)),
        n_arenas=len(arena_mappings(pid)),
        longest_ms=longest_ms,
        notes=tuple(sorted(set(notes))),
    )


def _torment_redis(n_cycles: int) -> _Seen:
    """Run Redis under redis-benchmark."""
    executable = build_redis(Variant.RETPOLINE)
    with RedisServer("redis", executable, "get") as server:
        path = server.socket_path
        load = RedisBenchmark(executable.with_name("redis-benchmark"), path)
        return _torment(server.pid, n_cycles, load, lambda: ask_redis(path))


def _torment_nginx(n_cycles: int) -> _Seen:
    """Run nginx under wrk."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise MissingTool("wrk", "wrk")
    with Nginx(build_nginx()) as server:
        load = Wrk(wrk, server.port)
        return _torment(server.pid, n_cycles, load, lambda: ask_nginx(server.port, server.page))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersRow:
    """The row ``servers``."""

    name: str = "servers"
    about: str = "Redis and nginx under load, attached to and detached from every second"
    quick_s: float = 16.0
    full_s: float = 145.0

    def run(self, scale: Scale) -> Outcome:
        """Run both servers, one after the other."""
        begin_s = time.monotonic()
        n_cycles = scale.of(_FULL_CYCLES, least=4)
        figures: list[Figure] = []
        notes: list[str] = []
        for name, torment in (("redis", _torment_redis), ("nginx", _torment_nginx)):
            try:
                seen = torment(n_cycles)
            except (MissingTool, BenchError) as error:
                figures.append(Figure(name=name, value="not run", bar="run", is_met=False))
                notes.append(f"{name}: {error}")
                continue
            figures += _figures(name, seen)
            notes += _tell(name, seen)
        return Outcome(
            row=self.name,
            scale=f"{n_cycles} of {_FULL_CYCLES} attach and detach cycles on each server",
            figures=tuple(figures),
            notes=tuple(notes),
            seconds=time.monotonic() - begin_s,
        )


def _figures(name: str, seen: _Seen) -> list[Figure]:
    """Return what may not have gone wrong."""
    load = seen.load
    n_bad = seen.n_cycles - seen.n_clean
    return [
        Figure(
            name=f"{name}: failed requests",
            value=f"{load.n_failed:,} of {load.n_requests:,}",
            bar="0",
            is_met=load.n_failed == 0 and load.n_requests > 0,
        ),
        Figure(
            name=f"{name}: wrong answers to a client of our own",
            value=f"{seen.n_wrong} of {seen.n_asked}",
            bar="0",
            is_met=seen.n_wrong == 0,
        ),
        Figure(
            name=f"{name}: cycles that left something",
            value=f"{n_bad} of {seen.n_cycles}",
            bar="0",
            is_met=n_bad == 0,
        ),
        Figure(
            name=f"{name}: bytes of text changed, arenas left",
            value=f"{seen.n_changed}, {seen.n_arenas}",
            bar="0, 0",
            is_met=not seen.n_changed and not seen.n_arenas,
        ),
    ]


def _tell(name: str, seen: _Seen) -> list[str]:
    """Say what was done, so that nobody takes nothing for a success."""
    done = (
        f"{name}: {seen.n_promoted} promotions in {seen.n_cycles} cycles, longest stop "
        f"{seen.longest_ms:.1f} ms"
    )
    errors = [f"{name}: {seen.load.words}"] if seen.load.words else []
    return [done, *errors, *(f"{name}: {note}" for note in seen.notes)]


ROW = ServersRow()
