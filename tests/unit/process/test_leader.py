# SPDX-License-Identifier: Apache-2.0
"""Which thread shows a process, in made-up trees and here."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optpoline.process.leader import find_live_tid, has_ended, is_exiting

PID = 50
_WORKER = 0x400050, 0x7FFBFEFF
"""Flags and blocked signals of a worker of the kernel."""


def _stat(tid: int, state: str, flags: int = 0x400040, blocked: int = 0) -> str:
    """Return a thread's line; its other numbers are 0."""
    if state == "k":
        state, (flags, blocked) = "S", _WORKER
    return f"{tid} (a) Z b) {state} 0 0 0 0 0 {flags}{' 0' * 22} {blocked} 0\n"


def _write_threads(root: Path, states: str) -> None:
    (root / str(PID)).mkdir()
    (root / str(PID) / "status").write_text(f"State:\tS (sleeping)\nThreads:\t{len(states)}\n")
    for tid, state in enumerate(states, PID):
        directory = root / str(PID) / "task" / str(tid)
        directory.mkdir(parents=True)
        if state != "-":  # it exits between the listing and the look
            (directory / "stat").write_text(_stat(tid, state))


@pytest.mark.parametrize(
    ("states", "tid"),
    [
        ("S", 50),
        ("SR", 50),
        ("ZS", 51),
        ("ZXR", 52),
        ("ZZ", 50),
        ("Z-D", 52),
        ("Z", 50),
        ("-S", 50),
        ("ZkS", 52),
        ("Zk", 50),
    ],
)
def test_find_live_tid(tmp_path: Path, states: str, tid: int) -> None:
    _write_threads(tmp_path, states)
    assert find_live_tid(PID, proc_root=tmp_path) == tid


@pytest.mark.parametrize(
    ("states", "expected"),
    [("S", False), ("ZS", False), ("Z", True), ("ZX", True), ("Zk", True), ("ZkD", False)],
)
def test_has_ended(tmp_path: Path, states: str, expected: bool) -> None:
    _write_threads(tmp_path, states)
    assert has_ended(PID, proc_root=tmp_path) is expected
    assert has_ended(PID + 100, proc_root=tmp_path)


def test_gone(tmp_path: Path) -> None:
    assert find_live_tid(PID, proc_root=tmp_path) == PID


def test_ourselves() -> None:
    assert find_live_tid(os.getpid()) == os.getpid()


@pytest.mark.parametrize(
    ("state", "flags", "pending", "is_ending"),
    [
        ("S", 0x400040, 0, False),
        ("S", 0x400040, 1 << 14, False),
        ("S", 0x400040, 1 << 8, True),
        ("R", 0x400044, 0, True),
        ("Z", 0x400040, 0, True),
        ("k", 0, 0, True),
    ],
)
def test_is_exiting(tmp_path: Path, state: str, flags: int, pending: int, is_ending: bool) -> None:
    """Only when all of its threads are."""
    for tid in (PID, PID + 1):
        directory = tmp_path / str(PID) / "task" / str(tid)
        directory.mkdir(parents=True)
        (directory / "stat").write_text(_stat(tid, "Z", 4))
        (directory / "status").write_text("Name:\tSigPnd:\nState:\tZ\nSigPnd:\t0000000000000100\n")
    (directory / "stat").write_text(_stat(tid, state, flags))
    (directory / "status").write_text(f"Name:\ta\nState:\t{state}\nSigPnd:\t{pending:016x}\n")
    assert is_exiting(PID, proc_root=tmp_path) is is_ending


def test_what_is_gone_is_exiting(tmp_path: Path) -> None:
    assert is_exiting(PID, proc_root=tmp_path)
    assert not is_exiting(os.getpid())
