# SPDX-License-Identifier: Apache-2.0
"""A program of thousands of sites of which few run: those get blocks, the others never."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import optpoline
from bench.gen_sites import generate_hot_sites, hot_functions
from optpoline.controller import hot_sites
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.errors import PermissionDenied
from optpoline.process.perf import PcSampler
from tests.live.conftest import LiveTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

N_SITES = 5000
N_HOT = 50
CONFIG = optpoline.Config(learn_s=0.5)
TIMEOUT_S = 30.0


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a program that runs 50 functions in each of two phases."""
    directory = tmp_path_factory.mktemp("hot")
    source = directory / "sites.c"
    source.write_text(generate_hot_sites(N_SITES, n_hot=N_HOT))
    path = directory / "sites"
    flags = (*RETPOLINE, "-O1", "-foptimize-sibling-calls", "-mindirect-branch-register")
    subprocess.run(["gcc", *flags, "-o", str(path), str(source)], check=True)
    return path


@pytest.fixture
def target(program: Path) -> Iterator[LiveTarget]:
    """Return the running program."""
    target = LiveTarget([str(program)])
    yield target
    with target.process as process:
        process.kill()


def hot_names(phase: int) -> set[str]:
    """Return the functions that run in a phase."""
    return {f"function_{n}" for n in hot_functions(N_SITES, N_HOT, 2, phase)}


def promoted_names(session: optpoline.Session) -> set[str | None]:
    """Return the functions that have a promoted site."""
    return {r.site.function for r in session.records if r.state is SiteState.PROMOTED}


def refused_names(session: optpoline.Session) -> set[str | None]:
    """Return the functions that have a site which may not be touched: it crosses a page."""
    return {site.function for site in session.sites if site.refusal is not None}


def n_learned(session: optpoline.Session) -> int:
    """Return how many sites have ever had a learning block."""
    return sum(1 for record in session.records if record.learner is not None)


def watch_until(session: optpoline.Session, condition: Callable[[], bool]) -> None:
    """Watch until something holds."""
    end_s = time.monotonic() + TIMEOUT_S
    while not condition():
        assert time.monotonic() < end_s, promoted_names(session)
        session.watch(0.2)


def check_phases(target: LiveTarget, config: optpoline.Config) -> None:
    """Follow the program from one phase to the next, and leave it as it was."""
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid, config=config) as session:
        assert len(session.records) >= N_SITES > hot_sites.ALL_AT_ONCE_SITES
        session.learn()
        session.promote()
        refused = refused_names(session)
        first, both = hot_names(0) - refused, (hot_names(0) | hot_names(1)) - refused
        assert len(both) > 1.9 * N_HOT
        assert promoted_names(session) <= hot_names(0)
        watch_until(session, lambda: promoted_names(session) >= first)
        target.ask("1")
        watch_until(session, lambda: promoted_names(session) >= both)
        assert promoted_names(session) <= hot_names(0) | hot_names(1)
        # Three sites in a function at most, and a few others by mistake.
        assert n_learned(session) <= 2 * N_HOT * 3 + 50
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert "rounds" in target.finish()


def test_only_what_runs_is_learned(target: LiveTarget) -> None:
    check_phases(target, CONFIG)


def test_without_clocks_threads_are_stopped_to_look_at_them(
    target: LiveTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_: PcSampler) -> None:
        raise PermissionDenied("no clocks today")

    monkeypatch.setattr(PcSampler, "open", refuse)
    with optpoline.attach(target.pid, config=CONFIG) as session:
        end_s = time.monotonic() + TIMEOUT_S
        # How many stops fit a window is the machine's affair; the hottest are soon met.
        while len(promoted_names(session)) < 5:
            assert time.monotonic() < end_s, promoted_names(session)
            session.learn()
            session.promote()
        assert promoted_names(session) <= hot_names(0)
        assert n_learned(session) <= 3 * N_HOT
        assert session.detach().outcome is DetachOutcome.CLEAN
    assert "rounds" in target.finish()
