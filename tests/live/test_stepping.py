# SPDX-License-Identifier: Apache-2.0
"""A debugger steps through learning blocks, and lets go inside one: always through, and exact."""

from __future__ import annotations

import json
import shutil
import subprocess
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.summary import DetachOutcome
from optpoline.model import SiteKind
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb"),
]

LEARN_S = 1.0
N_STEPS = 2_000
N_LETTING_GO = 3
N_ROUNDS = 500_000
_POLL_S = 0.01
_TIMEOUT_S = 60.0

STEP = """
import gdb, json

def block_of(pc):
    for number, (start, end) in enumerate(BLOCKS):
        if start <= pc < end:
            return number
    return None

gdb.execute("thread 2", to_string=True)
open(ATTACHED, "w").close()
steps, left, was = 0, [0] * len(BLOCKS), None
while steps < N_STEPS or block_of(pc) is None:
    gdb.execute("stepi", to_string=True)
    pc = int(gdb.selected_frame().pc())
    now = block_of(pc)
    steps += 1
    if was is not None and now != was:
        left[was] += 1
    was = now
json.dump(left, open(OUT, "w"))
"""
"""Runs in gdb: steps a worker from where it waits through blocks, and on into one, to be left
there. The first step ends when the program is told to work."""


def step(
    pid: int, blocks: list[tuple[int, int]], n_steps: int, out: Path, attached: Path
) -> list[int]:
    """Step a program's first worker in a gdb that attaches, and detaches inside a block.

    Returns:
        How often it was stepped out of each block.
    """
    settings = f"BLOCKS, N_STEPS, pc = {blocks!r}, {n_steps}, 0\n"
    files = f"OUT, ATTACHED = {str(out)!r}, {str(attached)!r}\n"
    script = out.with_suffix(".py")
    script.write_text(settings + files + STEP)
    command = ["gdb", "-q", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
    command += ["-p", str(pid), "-ex", f"source {script}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=out.parent
    )
    assert out.exists(), (done.stdout[-2000:], done.stderr[-2000:])
    found = json.loads(out.read_text())
    out.unlink()
    assert isinstance(found, list)
    return found


def work(live: LiveTarget, n_rounds: int, after: Path | None = None) -> tuple[int, str]:
    """Let a target work, once a file is there; return its calls, and what it computed."""
    deadline_s = time.monotonic() + _TIMEOUT_S
    while after is not None and not after.exists() and time.monotonic() < deadline_s:
        time.sleep(_POLL_S)
    calls = int(live.ask(str(n_rounds)).split()[1])
    return calls, live.ask("targets").split()[-1]


def drain(session: optpoline.Session) -> Counter[SiteKind]:
    """Return how often each kind of site branched since the last drain."""
    kinds = {record.site.addr: record.site.kind for record in session.records}
    return Counter({kinds[addr]: counts.total for addr, counts in session.drain().items()})


@pytest.mark.parametrize("shared_counters", [False, True], ids=["rows", "one-row"])
def test_steps_through_learning_blocks(
    start_target: StartTarget, tmp_path: Path, shared_counters: bool
) -> None:
    plain = start_target("counted", "2", "quiet", flags=RETPOLINE)
    live = start_target("counted", "2", "quiet", flags=RETPOLINE)
    before = Witness.of(live.pid)
    config = optpoline.Config(shared_counters=shared_counters)
    linked = tmp_path / "linked"

    def tell(event: optpoline.Event) -> None:
        if event.kind is optpoline.EventKind.LEARNING:
            linked.touch()

    with (
        optpoline.attach(live.pid, config=config, on_event=tell) as session,
        ThreadPoolExecutor(max_workers=1) as worker,
    ):
        working = worker.submit(work, live, N_ROUNDS, linked)
        session.learn(LEARN_S)
        calls, result = working.result(_TIMEOUT_S)
        assert (calls, result) == work(plain, N_ROUNDS)
        assert drain(session) == {SiteKind.CALL: calls, SiteKind.JUMP: calls}
        by_kind = {record.site.kind: record for record in session.records}
        assert by_kind.keys() == {SiteKind.CALL, SiteKind.JUMP}
        # Some targets are known, and some have slots.
        newest = [[*record.tables.values()][-1] for record in session.records]
        assert all(block.plan.hit_count_addrs and block.plan.open_slots for block in newest)
        blocks = [(int(block.addr), int(block.addr) + block.size) for block in newest]
        for number in range(1 + N_LETTING_GO):
            attached = tmp_path / f"attached-{number}"
            working = worker.submit(work, live, N_ROUNDS, attached)
            n_steps = N_STEPS if number == 0 else N_STEPS // 10
            left = step(live.pid, blocks, n_steps, tmp_path / "steps", attached)
            answer = working.result(_TIMEOUT_S)
            # In and out again, of both, again and again.
            assert min(left) >= n_steps // 200, left
            assert answer == work(plain, N_ROUNDS)
            assert drain(session) == {SiteKind.CALL: answer[0], SiteKind.JUMP: answer[0]}
        assert audit(live.pid).faults == ()
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(live.pid)
    assert (live.finish(), plain.finish()) == ("", "")
