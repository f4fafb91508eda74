# SPDX-License-Identifier: Apache-2.0
"""Policies on a program that runs: flips are followed at once, steady sites are left alone.

How soon is measured on a machine of its own (bench); here others may have the CPUs.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field

import pytest

import optpoline
from optpoline.controller.events import Event, EventKind
from optpoline.controller.summary import DetachOutcome
from optpoline.promote.policies import POLICY_NAMES, policy_named
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

FLIP_S = 1.0
"""Time for what takes 0.1 s with CPUs to itself; a window by the clock comes later."""

LEARN_S = 0.1


@dataclass
class Flipper:
    """Sets phases of a target while its session is being watched."""

    target: LiveTarget
    flips_s: list[float] = field(default_factory=list)
    changes_s: list[float] = field(default_factory=list)

    def note(self, event: Event) -> None:
        """Note re-promotions."""
        if event.kind is EventKind.RELEARNED:
            self.changes_s.append(event.time_ns / 1e9)

    def flip(self, phase: int) -> None:
        """Set a phase; it holds when this returns."""
        self.flips_s.append(time.monotonic())
        self.target.ask(str(phase))

    def watch_flip(self, session: optpoline.Session, after_s: float, phase: int) -> None:
        """Watch for a while, with a flip in the middle of it."""
        timer = threading.Timer(after_s, self.flip, (phase,))
        timer.start()
        session.watch(after_s + FLIP_S)
        timer.join()

    def latency_s(self, number: int) -> float:
        """Return how long after a flip the first site was promoted anew."""
        flip_s = self.flips_s[number]
        return min((s - flip_s for s in self.changes_s if s > flip_s), default=math.inf)


def test_flip_is_followed_at_once(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    flipper = Flipper(target)
    before = Witness.of(target.pid)
    # No window comes by the clock: what is followed was seen in the misses.
    config = optpoline.Config(learn_s=LEARN_S, sample_every_s=3600.0, sample_every_max_s=3600.0)
    with optpoline.attach(target.pid, config=config, on_event=flipper.note) as session:
        session.learn()
        session.promote()
        # At odd times, so that some fall between polls, some into a part of a window.
        for number, phase in enumerate((4, 1, 2)):
            flipper.watch_flip(session, 0.513 + 0.117 * number, phase)
            assert flipper.latency_s(number) < FLIP_S
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_flip_in_the_middle_of_a_window_is_followed_as_well(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    flipper = Flipper(target)
    # Windows without a pause: there is always one under way.
    config = optpoline.Config(
        learn_s=LEARN_S, sample_every_s=0.0, sample_every_max_s=0.0, overhead_ratio=100.0
    )
    with optpoline.attach(target.pid, config=config, on_event=flipper.note) as session:
        session.learn()
        session.promote()
        for number, phase in enumerate((4, 1, 2)):
            flipper.watch_flip(session, 0.413 + 0.063 * number, phase)
            assert flipper.latency_s(number) < FLIP_S
        assert session.detach().outcome is DetachOutcome.CLEAN


@pytest.mark.parametrize("phase", [1, 2, 3], ids=["two", "four", "eight"])
def test_even_targets_in_turn_are_promoted_once(start_target: StartTarget, phase: int) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    target.ask(str(phase))
    with optpoline.attach(target.pid, config=optpoline.Config(learn_s=LEARN_S)) as session:
        session.learn()
        session.promote()
        session.watch(5.0)
        (site,) = (s for s in session.summary().sites if s.kind == "call" and s.hit_rate)
        assert sum(t.promoted for t in site.targets) >= 2**phase
        assert max(record.n_relearned for record in session.records) <= 1


@pytest.mark.parametrize("name", POLICY_NAMES)
def test_every_policy_keeps_the_program_right(start_target: StartTarget, name: str) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    config = optpoline.Config(learn_s=LEARN_S, poll_s=0.02, policy=policy_named(name))
    with optpoline.attach(target.pid, config=config) as session:
        session.learn()
        assert session.promote() >= 1
        for phase in (1, 4, 3, 0):
            target.ask(str(phase))
            session.watch(0.3)
        follows = session.summary().relearned > 0
        assert follows == (name in ("adaptive", "cree"))
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
