# SPDX-License-Identifier: Apache-2.0
"""Redis and nginx under load, attached to and detached from every second.

The load comes from redis-benchmark and wrk, over the loopback interface; what they call an
error is a failed request. Beside them a client of our own asks for what it knows, once a
second, and after the last detach the server's text is compared with what it was before.
"""

from __future__ import annotations

import re
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from bench.build import Variant
from bench.errors import BenchError
from bench.programs.redis import RedisServer, build_redis
from optpoline import Config, DetachOutcome, attach
from optpoline.errors import ArenaError, StopTimeout, UnsupportedTarget
from tests.live.witness import Witness, arena_mappings
from torture.errors import MissingTool, TortureError
from torture.nginx import Nginx, build_nginx
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW", "ServersRow"]

_FULL_CYCLES = 60
_CYCLE_S = 1.0
_CONFIG = Config(learn_s=0.25, relearn_s=0.1)
_WATCH_S = 0.3
_MORE_LOAD_S = 3.0
"""The load goes on for so long after the last detach."""

_TIMEOUT_S = 5.0
_REDIS_TESTS = "get,set,lpush,lpop,zadd,mset"
_REDIS_REQUESTS = 40_000
"""Of each test in one run of redis-benchmark, about 2 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Loaded:
    """What the load's own client counted."""

    n_requests: int
    n_failed: int
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class _Seen:
    """What one server went through."""

    load: _Loaded
    n_cycles: int
    n_clean: int
    n_promoted: int
    n_asked: int
    n_wrong: int
    n_changed: int
    n_arenas: int
    longest_ms: float
    notes: tuple[str, ...]


class _Load(Protocol):
    """A client that keeps a server busy."""

    def start(self, seconds: float) -> None:
        """Begin, for about so long."""

    def finish(self) -> _Loaded:
        """Wait for its end, and read what it says."""


class _Wrk:
    """The load of wrk on nginx."""

    def __init__(self, executable: str, port: int) -> None:
        """Keep where to go."""
        self._command = [executable, "-t", "1", "-c", "8", "--timeout", "2s"]
        self._url = f"http://127.0.0.1:{port}/again/page"
        self._process: subprocess.Popen[str] | None = None
        self._end_s = 0.0

    def start(self, seconds: float) -> None:
        """Begin."""
        command = [*self._command, "-d", f"{int(seconds)}s", self._url]
        self._process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        self._end_s = seconds + 30

    def finish(self) -> _Loaded:
        """Read what wrk counted."""
        assert self._process is not None
        said, _ = self._process.communicate(timeout=self._end_s)
        if self._process.returncode:
            raise TortureError(f"wrk ended with status {self._process.returncode}: {said[-300:]}")
        return read_wrk(said)


def read_wrk(said: str) -> _Loaded:
    """Read the words of wrk: all requests, and those that failed.

    Raises:
        TortureError: if they are not what wrk says.
    """
    requests = re.search(r"(\d+) requests in", said)
    if not requests:
        raise TortureError(f"wrk said {said[-300:]!r}")
    n_failed = sum(int(n) for n in re.findall(r"Non-2xx or 3xx responses: (\d+)", said))
    errors = re.search(r"Socket errors: (.*)", said)
    if errors:
        n_failed += sum(int(n) for n in re.findall(r"\d+", errors[1]))
    return _Loaded(
        n_requests=int(requests[1]), n_failed=n_failed, words=errors[0] if errors else ""
    )


class _RedisBenchmark:
    """The load of redis-benchmark, one run after the other."""

    def __init__(self, executable: Path, path: Path) -> None:
        """Keep where to go."""
        shell = (
            "end=$(($(date +%s) + $0)); "
            'while [ $(date +%s) -lt $end ]; do "$@" || { echo "Error: status $?"; sleep 0.2; }; '
            "done"
        )
        options = ["-c", "20", "-P", "4", "-r", "10000", "-e", "--csv", "-t", _REDIS_TESTS]
        client = [str(executable), "-s", str(path), "-n", str(_REDIS_REQUESTS), *options]
        self._shell, self._client = shell, client
        self._process: subprocess.Popen[str] | None = None

    def start(self, seconds: float) -> None:
        """Begin."""
        command = ["sh", "-c", self._shell, str(int(seconds)), *self._client]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self) -> _Loaded:
        """Read what it printed."""
        assert self._process is not None
        said, _ = self._process.communicate(timeout=120)
        return read_redis_benchmark(said)


def read_redis_benchmark(said: str) -> _Loaded:
    """Read the words of many runs: one line a test that got through, else its errors."""
    n_done, errors = 0, []
    for line in said.splitlines():
        if re.match(r'"[^"]*","\d', line):
            n_done += _REDIS_REQUESTS
        elif "rror" in line:
            errors.append(line)
    return _Loaded(n_requests=n_done, n_failed=len(errors), words="; ".join(errors[:3]))


def _ask_nginx(server: Nginx) -> bool:
    """Ask for the page; tell whether it came as it should."""
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=_TIMEOUT_S) as client:
            client.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            answer = _read_all(client)
    except OSError:
        return False
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200 ") and body == server.page


def _ask_redis(path: Path) -> bool:
    """Store a value and a list and ask for them; tell whether they came as they should."""
    script = b'return redis.call("lrange", KEYS[1], 0, -1)'
    steps: list[tuple[tuple[bytes, ...], bytes]] = [
        ((b"SET", b"torture", b"value"), b"+OK\r\n"),
        ((b"APPEND", b"torture", b"s"), b":6\r\n"),
        ((b"GET", b"torture"), b"$6\r\nvalues\r\n"),
        ((b"DEL", b"torture:list"), b":"),
        ((b"RPUSH", b"torture:list", b"a", b"b"), b":2\r\n"),
        ((b"EVAL", script, b"1", b"torture:list"), b"*2\r\n$1\r\na\r\n$1\r\nb\r\n"),
    ]
    try:
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(_TIMEOUT_S)
            client.connect(str(path))
            return all(_ask(client, words).startswith(answer) for words, answer in steps)
    except OSError:
        return False


def _ask(client: socket.socket, words: Sequence[bytes]) -> bytes:
    """Send one command of Redis; return its short answer."""
    parts = [b"$%d\r\n%s\r\n" % (len(word), word) for word in words]
    client.sendall(b"*%d\r\n%s" % (len(words), b"".join(parts)))
    return client.recv(4096)


def _read_all(client: socket.socket) -> bytes:
    """Read until the other end closes."""
    pieces = []
    while piece := client.recv(65536):
        pieces.append(piece)
    return b"".join(pieces)


def _torment(pid: int, n_cycles: int, load: _Load, ask: Callable[[], bool]) -> _Seen:
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
        path = server.socket
        load = _RedisBenchmark(executable.with_name("redis-benchmark"), path)
        return _torment(server.pid, n_cycles, load, lambda: _ask_redis(path))


def _torment_nginx(n_cycles: int) -> _Seen:
    """Run nginx under wrk."""
    wrk = shutil.which("wrk")
    if wrk is None:
        raise MissingTool("wrk", "wrk")
    with Nginx(build_nginx()) as server:
        load = _Wrk(wrk, server.port)
        return _torment(server.pid, n_cycles, load, lambda: _ask_nginx(server))


@dataclass(frozen=True, slots=True, kw_only=True)
class ServersRow:
    """The row ``servers``."""

    name: str = "servers"
    about: str = "Redis and nginx under load, attached to and detached from every second"
    quick_s: float = 16.0
    full_s: float = 130.0

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
