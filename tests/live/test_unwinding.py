# SPDX-License-Identifier: Apache-2.0
"""Exceptions, cancellation, ``backtrace()``: what unwinds the stack sees its own frames."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome
from tests.live.conftest import TARGETS, LiveTarget
from tests.live.serving import promoted_sites
from tests.live.witness import VARIANTS, Witness

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
]

CHAINS = (0, 1)
SITES = {"outer", "guarded", "tail"}
"""Functions of the target whose sites its chains go through."""


@pytest.fixture(scope="module")
def build(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return a function that compiles the target in one variant, once."""
    directory = tmp_path_factory.mktemp("unwind")

    def build_one(variant: str) -> Path:
        path = directory / variant
        if not path.exists():
            source = str(TARGETS / "unwind.cc")
            command = ["g++", *VARIANTS[variant], "-pthread", "-o", str(path), source]
            subprocess.run(command, check=True)
        return path

    return build_one


@pytest.fixture(params=list(VARIANTS))
def target(request: pytest.FixtureRequest, build: Callable[[str], Path]) -> Iterator[LiveTarget]:
    """Start the target in each variant; it is killed at the end if it still runs."""
    target = LiveTarget([str(build(request.param))])
    yield target
    with target.process as process:
        process.kill()


def _frames(target: LiveTarget) -> list[str]:
    """Return what backtrace() says in each chain."""
    frames = [target.ask(f"frames {chain}") for chain in CHAINS]
    assert all(len(line.split()) >= 6 for line in frames), frames
    return frames


def _check_unwinding(target: LiveTarget, expected: list[str]) -> None:
    """Backtraces are as expected; cancelled and exiting threads clean up after themselves."""
    assert _frames(target) == expected
    assert target.ask("cancel 20") == "cancelled 20"
    assert target.ask("exit") == "exited 1"


def _check_promoted(session: optpoline.Session, is_stripped: bool) -> None:
    """The chains go through promoted sites."""
    promoted = [record.site for record in promoted_sites(session)]
    if is_stripped:
        assert len(promoted) >= len(SITES)
        return
    names = " ".join(site.function or "" for site in promoted)
    assert {name for name in SITES if name in names} == SITES, names


def test_unwinding_through_blocks(target: LiveTarget, request: pytest.FixtureRequest) -> None:
    before = Witness.of(target.pid)
    expected = _frames(target)
    assert len(set(expected)) == len(CHAINS)
    with optpoline.attach(target.pid) as session:
        session.learn(0.3)
        # Sites lead to counting blocks until they are promoted.
        assert before.changed_bytes(target.pid)
        _check_unwinding(target, expected)
        session.promote()
        _check_promoted(session, "stripped" in request.node.callspec.id)
        _check_unwinding(target, expected)
        session.watch(0.3)
        _check_unwinding(target, expected)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check_text(target.pid)
    _check_unwinding(target, expected)
    assert target.finish().startswith("wrong 0 rounds")


def test_unwinding_all_the_time(target: LiveTarget) -> None:
    """Attach and detach over and over; the program throws all the while."""
    before = Witness.of(target.pid)
    for _ in range(8):
        with optpoline.attach(target.pid) as session:
            session.learn(0.05)
            session.promote()
            session.watch(0.05)
            assert session.detach().outcome is DetachOutcome.CLEAN
        before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
