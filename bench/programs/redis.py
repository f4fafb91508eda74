# SPDX-License-Identifier: Apache-2.0
"""Redis under its own redis-benchmark, pipelined, over a Unix socket.

The time of a request is the CPU time of the server per request, as the scheduler counts
it. The server has one busy thread, so this is what bounds its throughput; the throughput
that redis-benchmark reports also depends on how fast the client happens to be. Both
run on one CPU, so that they never disturb each other's caches while they are measured.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import subprocess
import tempfile
import time
from pathlib import Path

from bench.build import Variant, build_once, variant_flags
from bench.commands import end_process, run_command
from bench.errors import BenchError
from bench.sources import REDIS, fetch_source
from bench.workload import Workload

__all__ = ["IN_TURN", "WORKLOADS", "RedisServer", "build_redis"]

_TESTS = {
    "get": 150_000,
    "set": 150_000,
    "lpush": 150_000,
    "zadd": 60_000,
    "lrange_100": 12_000,
    "mset": 25_000,
}
"""Test of redis-benchmark to requests per iteration, about 0.1 s of the server's time."""

_TURN_S = 0.7
"""Time of each test where all take turns."""

_CLIENT = ("-P", "16", "-c", "20", "-r", "10000", "--csv")
_SERVER = ("--port", "0", "--save", "", "--appendonly", "no", "--daemonize", "no")
_START_S = 10.0


class RedisServer:
    """One running server, made to answer one test; leaving the ``with`` block ends it."""

    def __init__(self, name: str, executable: Path, test: str) -> None:
        """Start the server and wait until it accepts connections."""
        self.name = name
        self.result: str | None = "answered"
        self._test = test
        self._directory = Path(tempfile.mkdtemp(prefix="redis-"))
        self._socket = self._directory / "socket"
        self._pinned = ("taskset", "-c", str(max(os.sched_getaffinity(0))))
        client = str(executable.with_name("redis-benchmark"))
        self._client = (*self._pinned, client, "-s", str(self._socket), *_CLIENT)
        self._process = subprocess.Popen(
            [*self._pinned, str(executable), *_SERVER, "--unixsocket", str(self._socket)],
            cwd=self._directory,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        try:
            self._wait_ready()
            if test.startswith("lrange"):
                self._ask("lpush", 1600)
        except BaseException:
            self.close()
            raise

    @property
    def pid(self) -> int:
        """Process id of the server."""
        return self._process.pid

    @property
    def socket_path(self) -> Path:
        """Unix socket that it listens on."""
        return self._socket

    def iterate(self) -> int:
        """Run the test once.

        Returns:
            CPU time of the server per 1000 requests, in nanoseconds.

        Raises:
            BenchError: if the server has gone or the client fails.
        """
        requests = _TESTS[self._test]
        before = self._cpu_ns()
        self._ask(self._test, requests)
        return (self._cpu_ns() - before) * 1000 // requests

    def close(self) -> None:
        """End the server, and remove what it wrote."""
        end_process(self._process)
        shutil.rmtree(self._directory, ignore_errors=True)

    def __enter__(self) -> RedisServer:
        """Return the running server."""
        return self

    def __exit__(self, *_: object) -> None:
        """End the server."""
        self.close()

    def _ask(self, test: str, requests: int) -> None:
        """Run redis-benchmark, and check that it got through."""
        said = run_command(
            [*self._client, "-t", test, "-n", str(requests)],
            timeout_s=120,
        )
        if len(said.splitlines()) < 2:
            raise BenchError(f"{self.name}: redis-benchmark said {said!r}")

    def _cpu_ns(self) -> int:
        """Read the CPU time of all threads of the server."""
        try:
            tasks = Path(f"/proc/{self.pid}/task").iterdir()
            return sum(int((task / "schedstat").read_text().split()[0]) for task in tasks)
        except OSError as error:
            raise BenchError(f"{self.name} is gone: {error.strerror}") from error

    def _wait_ready(self) -> None:
        """Wait until the socket accepts connections."""
        deadline = time.monotonic() + _START_S
        while time.monotonic() < deadline:
            if self._process.poll() is not None:
                raise BenchError(f"{self.name} ended with status {self._process.returncode}")
            with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
                probe.connect(str(self._socket))
                return
            time.sleep(0.02)
        raise BenchError(f"{self.name} did not start within {_START_S:.0f} s")


class _InTurn(RedisServer):
    """A server that is asked for all tests in turn: a real program with real phases."""

    def __init__(self, name: str, executable: Path) -> None:
        """Start with the test that needs something to be there."""
        super().__init__(name, executable, "lrange_100")
        self._start_s = time.monotonic()

    def iterate(self) -> int:
        """Run the test whose turn it is."""
        turn = int((time.monotonic() - self._start_s) / _TURN_S)
        self._test = tuple(_TESTS)[turn % len(_TESTS)]
        return super().iterate()


def _workload(test: str) -> Workload:
    """Return the workload of one test of redis-benchmark."""

    def start(executable: Path, name: str) -> RedisServer:
        return RedisServer(name, executable, test)

    return Workload(group="redis", name=f"redis {test}, 1000 requests", start=start)


WORKLOADS = tuple(_workload(test) for test in _TESTS)

IN_TURN = Workload(
    group="redis",
    name=f"redis, {len(_TESTS)} tests in turn",
    start=lambda executable, name: _InTurn(name, executable),
)


def build_redis(variant: Variant) -> Path:
    """Build the server, with the C library's allocator; returns its executable.

    The client is the plain build's in every variant: only the server is measured. What
    Redis' own tests need besides is there as well.
    """
    root = fetch_source(REDIS)
    flags = variant_flags(variant)
    client = None
    if variant is not Variant.PLAIN:
        client = build_redis(Variant.PLAIN).with_name("redis-benchmark")
    is_tested = variant in (Variant.PLUGIN, Variant.PLUGIN_RETPOLINE)

    def build(directory: Path) -> Path:
        tree = directory / "tree"
        shutil.copytree(root, tree, symlinks=True)
        goals = ["redis-server"] if client else ["redis-server", "redis-benchmark"]
        goals += ["redis-cli"] if is_tested else []
        run_command(
            ["make", "-j2", "MALLOC=libc", "OPTIMIZATION=-O2", f"CFLAGS={' '.join(flags)}", *goals],
            cwd=tree / "src",
        )
        for name in goals:
            shutil.copy2(tree / "src" / name, directory / name)
        if client:
            shutil.copy2(client, directory / client.name)
        shutil.rmtree(tree)
        return directory / "redis-server"

    return build_once("redis", variant, [*flags], build)
