# SPDX-License-Identifier: Apache-2.0
"""The Python API on a real program: what it says, and how it takes being misused."""

from __future__ import annotations

import os
import signal
import time

import pytest

import optpoline
from optpoline import EventKind, OptpolineError, UsageError
from optpoline.process.procfs import read_status
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.documented import OF_DECLARED, read_examples, run_example
from tests.live.serving import learn_and_promote
from tests.live.witness import RETPOLINE, Witness

pytestmark = pytest.mark.live

_TIMEOUT_S = 30.0


@pytest.fixture
def target(start_target: StartTarget) -> LiveTarget:
    """Start a program that branches all the time."""
    return start_target("promote", "1", flags=RETPOLINE)


def test_a_session_that_is_over_says_so(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        learn_and_promote(session)
    over = f"the session with process {target.pid} is over"
    for use in (
        session.learn,
        session.promote,
        session.watch,
        session.detach,
        lambda: session.modules,
        lambda: session.sites,
    ):
        with pytest.raises(OptpolineError) as caught:
            use()
        assert str(caught.value) == over
    assert session.summary().promoted == 0
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_promoting_before_learning_is_an_error(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        with pytest.raises(UsageError) as caught:
            session.promote()
        assert caught.value.hint == "call learn() before promote()"
        learn_and_promote(session)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize(("name", "n_examples"), [("README.md", 1), ("docs/api.md", 3)])
def test_documented_examples_work(target: LiveTarget, name: str, n_examples: int) -> None:
    before = Witness.of(target.pid)
    examples = [example for example in read_examples(name) if OF_DECLARED not in example]
    assert len(examples) == n_examples
    for example in examples:
        run_example(example, name, target.pid)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_sessions_with_several_programs(start_target: StartTarget) -> None:
    targets = [start_target("promote", "1", flags=RETPOLINE) for _ in range(2)]
    before = [Witness.of(target.pid) for target in targets]
    one, other = (optpoline.attach(target.pid) for target in targets)
    with one, other:
        for session in (one, other):
            learn_and_promote(session)
        for session in (one, other):
            session.watch(0.3)
            assert session.summary().promoted > 0
    for witness, target in zip(before, targets, strict=True):
        witness.check(target.pid)
        assert target.finish().startswith("wrong 0 rounds")


def _kinds(events: list[optpoline.Event]) -> list[EventKind]:
    """Return the kinds of events that tell how a window ended."""
    ends = (EventKind.PROMOTED, EventKind.NOT_PROMOTED)
    return [event.kind for event in events if event.kind in ends]


def test_nothing_promoted_is_told_with_its_reason(start_target: StartTarget) -> None:
    target = start_target("life", "rest", flags=RETPOLINE)
    before = Witness.of(target.pid)
    events: list[optpoline.Event] = []
    with optpoline.attach(target.pid, on_event=events.append) as session:
        session.learn(0.1)
        assert session.promote() == 0
    assert _kinds(events) == [EventKind.NOT_PROMOTED]
    (said,) = (event.message for event in events if event.kind is EventKind.NOT_PROMOTED)
    assert said.startswith("nothing to promote yet: no site was reached")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_stopped_program_is_named_and_promoted_once_it_runs(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    events: list[optpoline.Event] = []
    os.kill(target.pid, signal.SIGSTOP)
    target.wait_for_state("T")
    with optpoline.attach(target.pid, on_event=events.append) as session:
        session.learn(0.1)
        assert session.promote() == 0
        assert "nothing to promote yet: the process is stopped" in events[-1].message
        os.kill(target.pid, signal.SIGCONT)
        deadline = time.monotonic() + _TIMEOUT_S
        while EventKind.PROMOTED not in _kinds(events):
            assert time.monotonic() < deadline, events
            session.watch(0.5)
        assert session.summary().promoted > 0
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_program_without_sites_is_named(start_target: StartTarget) -> None:
    target = start_target("promote", flags=("-O2",))
    with pytest.raises(optpoline.NoSites) as caught:
        optpoline.attach(target.pid)
    assert f"process {target.pid} ({read_status(target.pid).name}) has" in caught.value.message
    assert "0 inline retpolines" in caught.value.message
    assert "not built with retpolines" in (caught.value.hint or "")


def test_who_was_interrupted_while_detaching_can_attach_again(
    target: LiveTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = Witness.of(target.pid)

    def press_ctrl_c() -> None:
        raise KeyboardInterrupt

    session = optpoline.attach(target.pid)
    monkeypatch.setattr(session, "detach", press_ctrl_c)
    with pytest.raises(KeyboardInterrupt), session:
        session.learn(0.05)
    with optpoline.attach(target.pid) as again:
        assert again.detach().outcome is optpoline.DetachOutcome.CLEAN
    session.close()
    before.check(target.pid)
