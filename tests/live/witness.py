# SPDX-License-Identifier: Apache-2.0
"""What a program was like before we came, to be compared with what it is after.

Also how live tests build retpolined targets and call the command line.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from optpoline.model import Mapping
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps

__all__ = [
    "CLI",
    "RETPOLINE",
    "VARIANTS",
    "Argument",
    "Witness",
    "arena_mappings",
    "read_until",
    "run_cli",
    "run_json",
    "start_cli",
    "wait_for_line",
]

RETPOLINE = ("-O2", "-pthread", "-mindirect-branch=thunk", "-fcf-protection=none")

VARIANTS: dict[str, tuple[str, ...]] = {
    "pie": (*RETPOLINE, "-fPIE", "-pie"),
    "no-pie": (*RETPOLINE, "-fno-pie", "-no-pie"),
    "stripped": (*RETPOLINE, "-s"),
    "cs-prefix": (*RETPOLINE, "-mindirect-branch-cs-prefix"),
}
"""Flags for gcc by name of the variant."""

Argument = str | int | float | Path

CLI = (sys.executable, "-m", "optpoline.cli")

_TIMEOUT_S = 60.0


def arena_mappings(pid: int) -> list[Mapping]:
    """Return the mappings of arenas in a process."""
    return [m for m in read_maps(pid) if "memfd:optpoline" in m.path]


def _list_fds(pid: int) -> dict[str, str]:
    """Return what a process has open, by number."""
    fds: dict[str, str] = {}
    for number in os.listdir(f"/proc/{pid}/fd"):
        fds[number] = os.readlink(f"/proc/{pid}/fd/{number}")
    return fds


def _read_text(pid: int) -> dict[tuple[int, str], bytes]:
    """Return all file-backed executable memory of a process, arenas left out."""
    with RemoteMemory(pid) as memory:
        return {
            (int(m.start), m.path): memory.read(m.start, m.size)
            for m in read_maps(pid)
            if m.is_executable and m.inode and "memfd:optpoline" not in m.path
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Witness:
    """A program's text and open files at one moment."""

    text: dict[tuple[int, str], bytes]
    fds: dict[str, str]

    @classmethod
    def of(cls, pid: int) -> Witness:
        """Take it down."""
        return cls(text=_read_text(pid), fds=_list_fds(pid))

    def changed_bytes(self, pid: int) -> dict[int, tuple[int, int]]:
        """Return address: (before, now) of every byte of text that is not as it was."""
        changed: dict[int, tuple[int, int]] = {}
        now = _read_text(pid)
        for key, before in self.text.items():
            after = now[key]
            assert len(after) == len(before)
            if after != before:
                pairs = zip(before, after, strict=True)
                changed |= {key[0] + i: (a, b) for i, (a, b) in enumerate(pairs) if a != b}
        return changed

    def check_text(self, pid: int) -> None:
        """Check that every byte is as it was, and that no module came or went."""
        assert _read_text(pid).keys() == self.text.keys()
        changed = self.changed_bytes(pid)
        assert not changed, {hex(addr): pair for addr, pair in changed.items()}

    def check(self, pid: int) -> None:
        """Check that nothing of ours is left: text, arenas, open files."""
        self.check_text(pid)
        assert arena_mappings(pid) == []
        assert _list_fds(pid) == self.fds


def run_cli(*args: Argument, status: int | None = 0) -> subprocess.CompletedProcess[str]:
    """Run one command to its end and check its exit status (None: any)."""
    done = subprocess.run(
        [*CLI, *map(str, args)], capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
    )
    assert status is None or done.returncode == status, (done.returncode, done.stdout, done.stderr)
    return done


def run_json(*args: Argument, status: int = 0) -> dict:
    """Run one command with its document on stdout and return that."""
    done = run_cli(*args, "--json", "-", status=status)
    document = json.loads(done.stdout)
    assert isinstance(document, dict)
    assert document["schema_version"] == 1
    return document


def start_cli(*args: Argument, stdin: bool = False) -> subprocess.Popen[str]:
    """Start one command; the caller ends it.

    Args:
        args: What comes after ``optpoline``.
        stdin: Whether its standard input is a pipe, else it has ours.
    """
    return subprocess.Popen(
        [*CLI, *map(str, args)],
        stdin=subprocess.PIPE if stdin else None,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background has them ignored; a test sends them.
        preexec_fn=_reset_signals,
    )


def _reset_signals() -> None:
    """Give a command the signals that a terminal's foreground has."""
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def wait_for_line(controller: subprocess.Popen[str], start: str) -> None:
    """Read a command's words until a line begins like this."""
    said = read_until(controller, start)
    if not said.rpartition("\n")[2].startswith(start):
        raise AssertionError(f"no line begins with {start!r}: {said}")


def read_until(controller: subprocess.Popen[str], start: str) -> str:
    """Return a command's words up to a line that begins like this, or all that there are."""
    assert controller.stderr is not None
    said = ""
    for line in controller.stderr:
        if line.startswith(start):
            return said + line.rstrip("\n")
        said += line
    return said
