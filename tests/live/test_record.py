# SPDX-License-Identifier: Apache-2.0
"""Traces of real programs: every branch, in its order, and nothing left behind."""

from __future__ import annotations

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome
from optpoline.controller.tracing import RecordPlan, RecordTotals
from optpoline.simulate.trace import Trace
from optpoline.simulate.trace_file import TraceWriter, read_trace
from tests.live.conftest import BuildTarget, StartTarget
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

TIMEOUT_S = 60.0


BURSTS = RecordPlan(seconds=0.5, burst_s=0.1, every_s=0.1)
"""At 130 branches a millisecond a ring of 65,536 lasts five times as long as a burst."""

FOLLOWING = {"f0": "f1", "f1": "f2", "f2": "f3", "f3": "f0"}


def record(
    session: optpoline.Session, path: Path, plan: RecordPlan, n_branches: int = 1
) -> tuple[Trace, RecordTotals]:
    """Record until there was enough to record; return the trace as it was read back."""
    begin_s = time.monotonic()
    while True:
        with path.open("wb") as stream:
            writer = TraceWriter(stream, "target")
            totals = session.record(writer, plan)
            writer.finish()
        trace = read_trace(path)
        assert totals.n_branches == trace.n_branches
        assert totals.n_bursts == len(trace.bursts)
        assert totals.n_unknown == trace.n_unknown
        if trace.n_branches + trace.n_unknown >= n_branches:
            return trace, totals
        assert time.monotonic() - begin_s < TIMEOUT_S


def meanings(trace: Trace, kind: str) -> dict[int, str]:
    """Return the names of the targets of the program's own site of a kind, by pair."""
    function = {"call": "work", "jump": "tail"}[kind]
    return {
        number: trace.targets[pair.target].symbol or "?"
        for number, pair in enumerate(trace.pairs)
        if trace.sites[pair.site].kind == kind
        and (trace.sites[pair.site].function or "").split("+")[0] == function
    }


def assert_in_order(trace: Trace) -> None:
    """Check calls and tail calls of ``paced`` against what it does."""
    calls, tails = meanings(trace, "call"), meanings(trace, "jump")
    assert set(calls.values()) == set(tails.values()) == set(FOLLOWING)
    for burst in trace.bursts:
        assert (burst.n_dropped, burst.n_unknown) == (0, 0)
        for one, other in itertools.pairwise(burst.pairs.tolist()):
            if one in calls:
                # A call is followed by the tail call to the same function.
                assert tails[other] == calls[one]
            else:
                assert calls[other] == FOLLOWING[tails[one]]


def test_every_branch_in_its_order(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("paced", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(0.5)
        trace, _ = record(session, tmp_path / "trace", BURSTS, 5_000)
        # Tracing blocks are proved harmless like all others.
        report = optpoline.audit(target.pid)
        assert report.is_sound, report.faults
        assert session.detach().outcome is DetachOutcome.CLEAN
    assert_in_order(trace)
    assert {site.rate_hz is None for site in trace.sites} == {False}
    before.check(target.pid)
    assert arena_mappings(target.pid) == []
    assert target.finish() == "wrong 0\n"


def test_promoted_sites_are_led_back(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("paced", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(0.5)
        assert session.promote() == 2
        active = [record.active for record in session.records if record.active is not None]
        heads = [block.arena.head_of(block.addr) for block in active]
        trace, _ = record(session, tmp_path / "trace", BURSTS, 5_000)
        assert [block.arena.head_of(block.addr) for block in active] == heads
    assert_in_order(trace)
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"


def test_unknown_targets_are_counted(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("paced", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(0.5)
        target.ask("1")
        trace, _ = record(session, tmp_path / "trace", BURSTS, 5_000)
    # Two branches in ten go to f4, which nobody had met. The two sites of a burst begin and end one
    # after the other: whoever is put off its CPU in between sees more of one than of the other.
    assert trace.n_unknown == pytest.approx(trace.n_branches / 4, rel=0.25)
    assert trace.n_dropped == 0
    assert "f4" not in {one.symbol for one in trace.targets}
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"


def test_overruns_are_told(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("promote", "4", flags=RETPOLINE)
    before = Witness.of(target.pid)
    target.ask("2")
    # All the time, as fast as four threads can: what is lost must be counted.
    plan = RecordPlan(seconds=1.0, burst_s=0.25, every_s=0.0)
    with optpoline.attach(target.pid) as session:
        session.learn(0.3)
        trace, _ = record(session, tmp_path / "trace", plan, 100_000)
    made = np.bincount(
        np.concatenate([burst.pairs for burst in trace.bursts]), minlength=len(trace.pairs)
    )
    calls = sum(int(made[number]) for number in meanings(trace, "call"))
    tails = sum(int(made[number]) for number in meanings(trace, "jump"))
    # As many of one as of the other, but for what is under way or dropped.
    assert abs(calls - tails) <= trace.n_dropped + trace.n_unknown + 8 * len(trace.bursts)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_command_line(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("paced", flags=RETPOLINE)
    before = Witness.of(target.pid)
    path = tmp_path / "trace"
    document = run_json("record", target.pid, "--trace", path, "--duration", 1)
    assert document["command"] == "record"
    assert document["n_branches"] == read_trace(path).n_branches > 0
    before.check(target.pid)
    again = run_cli("record", target.pid, "--trace", path, "--duration", 1, status=2)
    assert "use --force" in again.stderr
    simulated = run_json("simulate", path, "--policy", "llvm", "--policy-set", "learn_s=0.1")
    # All of it after a tenth of a second of learning; four targets, of which it takes three at
    # most: none, for none has 30 % of the branches.
    assert (simulated["n_sites"], simulated["policies"][0]["promoted"]) == (2, 0)
    assert target.finish() == "wrong 0\n"


def record_command(program: Path, path: Path, duration_s: float, until: str) -> dict:
    """Record a program of our own, close its input at a line of ours; return the document."""
    document = path.with_suffix(".json")
    options = ("--trace", path, "--duration", duration_s, "--json", document)
    with start_cli("record", *options, "--", program, 1, stdin=True) as controller:
        try:
            wait_for_line(controller, until)
            output, _ = controller.communicate("", timeout=TIMEOUT_S)
        finally:
            controller.kill()
    lines = output.splitlines()
    assert lines[0] == "ready"
    assert lines[1].startswith("wrong 0 rounds")
    assert controller.returncode == 0
    found: dict = json.loads(document.read_text())
    assert found["exit_status"] == 0
    assert found["n_branches"] == read_trace(path).n_branches
    return found


def test_command_of_its_own(build_target: BuildTarget, tmp_path: Path) -> None:
    program = build_target("promote", *RETPOLINE)
    path = tmp_path / "trace"
    found = record_command(program, path, 4.0, str(path))
    assert not found["target_gone"]
    assert found["n_branches"] > 0
    assert found["detach"]["outcome"] == "clean"


def test_program_ends_while_it_is_recorded(build_target: BuildTarget, tmp_path: Path) -> None:
    program = build_target("promote", *RETPOLINE)
    # Before, in or after the first burst: the trace is whole, with what there was until then.
    found = record_command(program, tmp_path / "trace", 20.0, "recording for")
    assert found["target_gone"], found
    assert found["detach"]["outcome"] == "gone"
