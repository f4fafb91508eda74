# SPDX-License-Identifier: Apache-2.0
"""Clients that keep a server busy and count what failed, and such that know the answers."""

from __future__ import annotations

import re
import socket
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from torture.errors import TortureError

__all__ = [
    "Load",
    "Loaded",
    "RedisBenchmark",
    "Wrk",
    "ask_nginx",
    "ask_redis",
    "read_redis_benchmark",
    "read_wrk",
]

_TIMEOUT_S = 5.0
_REDIS_TESTS = "get,set,lpush,lpop,zadd,mset"
_REDIS_REQUESTS = 40_000
"""Of each test in one run of redis-benchmark, about 2 s."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Loaded:
    """What the load's own client counted."""

    n_requests: int
    n_failed: int
    words: str


class Load(Protocol):
    """A client that keeps a server busy."""

    def start(self, seconds: float) -> None:
        """Begin, for about so long."""

    def finish(self) -> Loaded:
        """Wait for its end, and read what it says."""


class Wrk:
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

    def finish(self) -> Loaded:
        """Read what wrk counted."""
        assert self._process is not None
        said, _ = self._process.communicate(timeout=self._end_s)
        if self._process.returncode:
            raise TortureError(f"wrk ended with status {self._process.returncode}: {said[-300:]}")
        return read_wrk(said)


def read_wrk(said: str) -> Loaded:
    """Read the words of wrk: all requests, and those that failed.

    Raises:
        TortureError: if they are not what wrk says.
    """
    requests = re.search(r"(\d+) requests in", said)
    if not requests:
        raise TortureError(f"wrk said {said[-300:]!r}")
    lines = re.findall(r"Socket errors: .*|Non-2xx or 3xx responses: \d+", said)
    n_failed = sum(int(n) for line in lines for n in re.findall(r" (\d+)\b", line))
    return Loaded(n_requests=int(requests[1]), n_failed=n_failed, words="; ".join(lines))


class RedisBenchmark:
    """The load of redis-benchmark, one run after the other."""

    def __init__(self, executable: Path, path: Path) -> None:
        """Keep where to go."""
        shell = (
            "end=$(($(date +%s) + $0)); "
            'while [ $(date +%s) -lt $end ]; do "$@" || { echo "Error: status $?"; sleep 0.2; }; '
            "done"
        )
        options = ["-c", "20", "-P", "4", "-r", "10000", "--csv", "-t", _REDIS_TESTS]
        client = [str(executable), "-s", str(path), "-n", str(_REDIS_REQUESTS), *options]
        self._shell, self._client = shell, client
        self._process: subprocess.Popen[str] | None = None

    def start(self, seconds: float) -> None:
        """Begin."""
        command = ["sh", "-c", self._shell, str(int(seconds)), *self._client]
        self._process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def finish(self) -> Loaded:
        """Read what it printed."""
        assert self._process is not None
        said, _ = self._process.communicate(timeout=120)
        return read_redis_benchmark(said)


def read_redis_benchmark(said: str) -> Loaded:
    """Read the words of many runs: a line for each test that got through, and errors."""
    n_done, errors = 0, []
    for line in said.splitlines():
        if re.match(r'"[^"]*","\d', line):
            n_done += _REDIS_REQUESTS
        elif not line.startswith('"test",'):
            errors.append(line)
    return Loaded(n_requests=n_done, n_failed=len(errors), words="; ".join(errors[:3]))


def ask_nginx(port: int, page: bytes) -> bool:
    """Ask for the page; tell whether it came as it should."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_TIMEOUT_S) as client:
            client.sendall(b"GET /page HTTP/1.0\r\n\r\n")
            answer = _read_all(client)
    except OSError:
        return False
    head, _, body = answer.partition(b"\r\n\r\n")
    return head.startswith(b"HTTP/1.1 200 ") and body == page


def ask_redis(path: Path) -> bool:
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
