# SPDX-License-Identifier: Apache-2.0
"""Build and start the programs that live tests attach to."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from optpoline.process.procfs import list_tids, read_state_char

TARGETS = Path(__file__).resolve().parent.parent / "targets"
_TIMEOUT_S = 30.0
_POLL_S = 0.001
_ALL_ONES = (1 << 64) - 1


class LiveTarget:
    """A started target; it runs until its standard input is closed."""

    def __init__(self, command: list[str]) -> None:
        """Start it and wait for its "ready"."""
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid
        assert self.process.stdout is not None
        assert self.process.stdout.readline() == "ready\n"

    def tell(self, line: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def ask(self, line: str) -> str:
        """Send it a line and return its answer without the newline."""
        self.tell(line)
        assert self.process.stdout is not None
        answer = self.process.stdout.readline()
        assert answer.endswith("\n"), f"no answer to {line!r}, only {answer!r}"
        return answer[:-1]

    def ask_to_block(self, start: int, end: int) -> str:
        """Have the target ``life`` block in a handler that interrupts code in a range."""
        return self.ask(f"block {start ^ _ALL_ONES:x} {end ^ _ALL_ONES:x}")

    def finish(self, status: int = 0) -> str:
        """Let it end by itself; check its exit status and return what it printed."""
        output, _ = self.process.communicate("", timeout=_TIMEOUT_S)
        assert self.process.returncode == status, output
        return output

    def wait_for_state(self, letters: str) -> None:
        """Wait until its first thread is in one of these states, as ps(1) names them."""
        deadline = time.monotonic() + _TIMEOUT_S
        while (state := read_state_char(self.pid, self.pid)) not in letters:
            assert time.monotonic() < deadline, f"state is {state}, not one of {letters}"
            time.sleep(_POLL_S)

    def wait_for_sleep(self, n_threads: int) -> None:
        """Wait until it has that many threads and all sleep."""
        deadline = time.monotonic() + _TIMEOUT_S
        while True:
            states = [read_state_char(self.pid, tid) for tid in list_tids(self.pid)]
            if states == ["S"] * n_threads:
                return
            assert time.monotonic() < deadline, states
            time.sleep(_POLL_S)


BuildTarget = Callable[..., Path]
StartTarget = Callable[..., LiveTarget]


@pytest.fixture(scope="session")
def build_target(tmp_path_factory: pytest.TempPathFactory) -> BuildTarget:
    """Return a function that compiles tests/targets/NAME.c with given flags, once."""
    directory = tmp_path_factory.mktemp("targets")
    built: dict[tuple[str, ...], Path] = {}

    def build(name: str, *flags: str) -> Path:
        key = (name, *flags)
        if key not in built:
            path = directory / f"{name}-{len(built)}"
            source = str(TARGETS / f"{name}.c")
            subprocess.run(
                ["gcc", "-O1", "-g", "-pthread", *flags, "-o", str(path), source], check=True
            )
            built[key] = path
        return built[key]

    return build


@pytest.fixture
def start_target(build_target: BuildTarget) -> Iterator[StartTarget]:
    """Return a function that starts a target; whatever still runs is killed at the end."""
    started: list[LiveTarget] = []

    def start(name: str, *args: str, flags: tuple[str, ...] = ()) -> LiveTarget:
        target = LiveTarget([str(build_target(name, *flags)), *args])
        started.append(target)
        return target

    yield start
    for target in started:
        with target.process as process:
            process.kill()
