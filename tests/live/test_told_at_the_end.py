# SPDX-License-Identifier: Apache-2.0
"""What a session tells at its end: children that keep promotions, long stops, no promotion."""

from __future__ import annotations

import json
import os
import signal

import pytest

import optpoline
from optpoline.controller.config import Config
from optpoline.controller.summary import ChildSummary
from tests.live.conftest import StartTarget
from tests.live.witness import (
    RETPOLINE,
    Witness,
    arena_mappings,
    run_cli,
    run_json,
    start_cli,
    wait_for_line,
)

pytestmark = pytest.mark.live

_TIMEOUT_S = 60.0
LEARN_S = 0.2


@pytest.mark.parametrize("option", ["--follow-fork", "--leave", None])
def test_children(start_target: StartTarget, option: str | None) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    options = () if option is None else (option,)
    args = ("attach", "--learn-seconds", LEARN_S, *options, "--json", "-", target.pid)
    with start_cli(*args) as controller:
        wait_for_line(controller, "promoted ")
        child = int(target.ask("fork").split()[1])
        controller.send_signal(signal.SIGINT)
        out, err = controller.communicate(timeout=_TIMEOUT_S)
        assert controller.returncode == 0, err
    document = json.loads(out)
    (told,) = document["detach"]["children"]
    assert told["pid"] == child
    notes = "\n".join(document["notes"])
    if option == "--follow-fork":
        assert told["kept"] == 0
        assert told["restored"] > 0
        assert "1 child process was restored as well" in notes
    else:
        assert told["kept"] == run_json("status", child)["left_behind"]["promoted"] > 0
        assert told["restored"] == 0
        assert f"child process {child} keeps {told['kept']} promoted sites" in notes
        assert f"`optpoline detach {child}`" in notes
    assert all(f"note: {note}" in err for note in document["notes"])
    if option == "--leave":
        detached = run_json("detach", target.pid)["detach"]
        assert detached["children"] == [told]
        assert f"`optpoline detach {child}`" in " ".join(detached["notes"])
    if option != "--follow-fork":
        assert run_json("detach", child)["detach"]["children"] == []
    before.check_text(child)
    assert arena_mappings(child) == []
    assert target.ask("join").startswith("status 0 wrong 0 rounds")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_no_children(start_target: StartTarget) -> None:
    """One that was undone, or that runs another program, keeps nothing."""
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        target.ask("fork")
        assert target.ask("join").startswith("status 0")
        child = int(target.ask("fork").split()[1])
        run_cli("detach", child)
        result = session.detach()
    assert result.children == ()
    assert not any("child" in note for note in result.notes)
    assert target.ask("join").startswith("status 0")
    assert target.finish().startswith("wrong 0 rounds")


def test_children_outlive_their_parent(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        n_promoted = session.promote()
        child = int(target.ask("fork").split()[1])
        # It ends by itself as soon as it runs without its parent.
        os.kill(child, signal.SIGSTOP)
        try:
            target.process.kill()
            session.watch(_TIMEOUT_S)
            result = session.detach()
            assert result.children == (ChildSummary(pid=child, kept=n_promoted),)
            assert f"`optpoline detach {child}`" in result.notes[-1]
            assert before.changed_bytes(child)
            run_cli("detach", child)
            before.check_text(child)
        finally:
            os.kill(child, signal.SIGKILL)


def test_stops_that_took_longer(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    config = Config(max_stop_s=1e-9, learn_s=LEARN_S)
    with optpoline.attach(target.pid, config=config) as session:
        session.learn()
        session.promote()
        session.detach()
        summary = session.summary()
    assert summary.stops_over_limit == summary.stops > 0
    assert summary.stop_ms_limit == pytest.approx(1e-6)
    (note,) = (note for note in summary.notes if "longer than" in note)
    assert f"the longest {summary.stop_ms_max:.1f} ms" in note
    assert target.finish().startswith("wrong 0 rounds")


def test_stops_that_did_not(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    report = run_json(
        "attach", "--learn-seconds", LEARN_S, "--duration", 0.4, "--max-stop-ms", 60_000, target.pid
    )
    assert report["stop_ms_limit"] == 60_000
    assert report["stops_over_limit"] == 0
    assert report["stops"] > 0
    assert not any("longer than" in note for note in report["notes"])
    assert target.finish().startswith("wrong 0 rounds")


def test_too_short_a_duration(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    report = run_json("attach", "--learn-seconds", 0.2, "--duration", 0.2, target.pid)
    assert report["promoted"] == 0
    assert any("the duration of 0.2 s was over" in note for note in report["notes"])
    assert target.finish().startswith("wrong 0 rounds")


def test_a_stopped_program(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    target.process.send_signal(signal.SIGSTOP)
    target.wait_for_state("T")
    report = run_json("attach", "--learn-seconds", LEARN_S, "--duration", 0.4, target.pid)
    assert report["promoted"] == 0
    assert any("is stopped (SIGCONT lets it run" in note for note in report["notes"])
    assert "; mind the warnings" in run_cli("doctor", target.pid).stdout
    target.process.send_signal(signal.SIGCONT)
    assert target.finish().startswith("wrong 0 rounds")


def test_notes_are_told_once(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    quick = ("--learn-seconds", LEARN_S, "--duration", 0.4)
    run_cli("attach", *quick, "--leave", target.pid)
    done = run_cli("attach", *quick, "-v", "--json", "-", target.pid)
    assert done.stderr.count("found what an earlier controller left") == 1
    assert "found what an earlier controller left" in " ".join(json.loads(done.stdout)["notes"])
    assert target.finish().startswith("wrong 0 rounds")
