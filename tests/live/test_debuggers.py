# SPDX-License-Identifier: Apache-2.0
"""gdb and perf see the program's own frames, and blocks by name."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome
from optpoline.patch.blocks import Block, point_back, redirect
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness, arena_mappings

pytestmark = pytest.mark.live

SHARE = Path(optpoline.__file__).parent / "share"
GDB_SCRIPT = SHARE / "optpoline-gdb.py"
PERF_SCRIPT = SHARE / "optpoline-perf.py"

needs_gdb = pytest.mark.skipif(shutil.which("gdb") is None, reason="needs gdb")
needs_perf = pytest.mark.skipif(shutil.which("perf") is None, reason="needs perf")

FLAGS = (*RETPOLINE, "-g", "-fno-omit-frame-pointer")

_TIMEOUT_S = 100.0
LEARN_S = 0.2

# --- gdb

FRAMES = """
import gdb, json, sys

def frames():
    found, frame = [], gdb.newest_frame()
    while frame is not None:
        found.append(frame.name() or "?")
        frame = frame.older()
    return found

gdb.execute("thread 2")
"""
"""Runs in gdb: the worker is the second thread."""

BREAK = (
    FRAMES
    + """
gdb.execute("break f0")
found = []
for _ in range(24):
    gdb.execute("continue", to_string=True)
    frame, lines = gdb.newest_frame(), []
    while frame is not None:
        lines.append([frame.name(), frame.find_sal().line, int(frame.pc())])
        frame = frame.older()
    if lines not in found:
        found.append(lines)
gdb.execute("delete")
json.dump(sorted(found), open(OUT, "w"))
"""
)
"""Collects the different backtraces at the start of a callee."""

STEP = (
    FRAMES
    + """
finder = sys.modules["optpoline_gdb"].Finder()
wanted, stacks, blocks, shown = set(WANTED), set(), {}, {}
for n in range(20000):
    block = finder.find(int(gdb.newest_frame().pc()))
    if block is None:
        stacks.add(tuple(frames()))
    else:
        blocks.setdefault(block.addr, set()).add(tuple(frames()))
        if block.addr not in shown:
            shown[block.addr] = gdb.execute("bt", to_string=True)
    # Both: enough was seen, and this is inside a block.
    if n > 3000 and wanted <= blocks.keys() and (block is not None or not wanted):
        break
    gdb.execute("stepi", to_string=True)
json.dump(
    {
        "stacks": sorted(stacks),
        "blocks": {str(addr): sorted(found) for addr, found in blocks.items()},
        "shown": {str(addr): text for addr, text in shown.items()},
        "is_inside": block is not None,
    },
    open(OUT, "w"),
)
"""
)
"""Steps until every wanted block was entered, and on into a block, to be left there."""


def _run_gdb(pid: int, code: str, out: Path, **values: object) -> object:
    """Run code in a gdb that attaches, and detaches at the end; return what it found."""
    script = out.with_suffix(".py")
    values["OUT"] = str(out)
    settings = "".join(f"{name} = {value!r}\n" for name, value in values.items())
    script.write_text(settings + code)
    command = ["gdb", "-q", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
    command += ["-p", str(pid), "-ex", f"source {GDB_SCRIPT}", "-ex", f"source {script}"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=out.parent
    )
    assert out.exists(), (done.stdout[-2000:], done.stderr[-2000:])
    result: object = json.loads(out.read_text())
    out.unlink()
    return result


@dataclass(frozen=True)
class Steps:
    """What stepping through the program showed."""

    stacks: set[tuple[str, ...]]
    blocks: dict[int, set[tuple[str, ...]]]
    shown: dict[int, str]
    is_inside: bool

    @property
    def own_stacks(self) -> set[tuple[str, ...]]:
        """Stacks without those inside thunks, whose unwind tables are wrong for jumps."""
        return {stack for stack in self.stacks if "thunk" not in stack[0]}


def _step(pid: int, out: Path, wanted: set[int]) -> Steps:
    """Single-step the program until every wanted block was entered."""
    found = _run_gdb(pid, STEP, out, WANTED=sorted(wanted))
    assert isinstance(found, dict)
    return Steps(
        stacks={tuple(stack) for stack in found["stacks"]},
        blocks={
            int(addr): {tuple(stack) for stack in stacks}
            for addr, stacks in found["blocks"].items()
        },
        shown={int(addr): text for addr, text in found["shown"].items()},
        is_inside=found["is_inside"],
    )


def _check_steps(steps: Steps, wanted: dict[int, SiteRecord], plain: Steps) -> None:
    """Every wanted block was entered, and the frames were those of the plain program."""
    assert wanted.keys() <= steps.blocks.keys()
    assert steps.is_inside
    assert steps.own_stacks <= plain.own_stacks
    for addr, stacks in steps.blocks.items():
        for stack in stacks:
            assert stack[1:] in plain.own_stacks, (hex(addr), stack)
    for addr, record in wanted.items():
        name = record.site.function or ""
        off = record.site.addr - (record.site.function_addr or 0)
        lines = [line for line in steps.shown[addr].splitlines() if line.startswith("#")]
        assert f"in optpoline block for {name}+{off} (" in lines[0]
        assert f" in {name} (" in lines[1]


@pytest.fixture
def target(start_target: StartTarget) -> LiveTarget:
    """Start a program with one worker thread that checks itself."""
    return start_target("promote", "1", flags=FLAGS)


def _check_goes_on(target: LiveTarget, phase: str) -> None:
    """The program was let go inside a block, and runs on."""
    rounds = int(target.ask(phase).split()[1])
    deadline = time.monotonic() + _TIMEOUT_S
    while int(target.ask(phase).split()[1]) <= rounds:
        assert time.monotonic() < deadline
        time.sleep(0.001)


def _blocks_in_use(session: optpoline.Session) -> dict[int, SiteRecord]:
    """Return the blocks that are entered when a site branches, and whose they are."""
    return {
        int(block.addr): record
        for record in session.records
        if record.home is not None
        for block in (record.home, record.active, record.counting)
        if block is not None
    }


@needs_gdb
@pytest.mark.parametrize(("phase", "n_blocks"), [("0", 4), ("3", 7)])
def test_steps_through_counting_blocks(
    target: LiveTarget, tmp_path: Path, phase: str, n_blocks: int
) -> None:
    """First ones, and with many targets bigger ones, entered through redirected heads."""
    target.ask(phase)
    before = Witness.of(target.pid)
    plain = _step(target.pid, tmp_path / "plain", set())
    stop = threading.Event()
    with ThreadPoolExecutor(max_workers=1) as executor:
        session = executor.submit(optpoline.attach, target.pid).result()
        learning = executor.submit(session.learn, _TIMEOUT_S, stop)
        try:
            wanted = _wait_for_blocks(session, n_blocks)
            steps = _step(target.pid, tmp_path / "steps", set(wanted))
            _check_steps(steps, wanted, plain)
            _check_goes_on(target, phase)
        finally:
            stop.set()
            learning.result()
            result = executor.submit(session.detach).result()
    assert result.outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def _wait_for_blocks(session: optpoline.Session, n_blocks: int) -> dict[int, SiteRecord]:
    """Wait until that many blocks are in use and no more come."""
    deadline, found = time.monotonic() + _TIMEOUT_S, _blocks_in_use(session)
    while len(found) < n_blocks:
        assert time.monotonic() < deadline, found
        time.sleep(0.2)
        found = _blocks_in_use(session)
    time.sleep(0.2)
    return _blocks_in_use(session)


@needs_gdb
@pytest.mark.parametrize("phase", ["0", "1", "3"])
def test_steps_through_promoted_blocks(target: LiveTarget, tmp_path: Path, phase: str) -> None:
    """One guard, a chain, and a tree relative to a base; then all through redirected heads."""
    target.ask(phase)
    before = Witness.of(target.pid)
    plain = _step(target.pid, tmp_path / "plain", set())
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        assert session.promote() == 4
        promoted = [record for record in session.records if record.home is not None]
        plans = [record.home.plan for record in promoted if record.home is not None]
        assert any(plan.base is not None for plan in plans) == (phase == "3")
        wanted = _blocks_in_use(session)
        _check_steps(_step(target.pid, tmp_path / "steps", set(wanted)), wanted, plain)
        _check_goes_on(target, phase)
        for record in promoted:
            home, learner = _home_and_learner(record)
            redirect(home, learner.addr)
            wanted[int(learner.addr)] = record
        _check_steps(_step(target.pid, tmp_path / "steps", set(wanted)), wanted, plain)
        _check_goes_on(target, phase)
        for record in promoted:
            point_back(_home_and_learner(record)[0])
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def _home_and_learner(record: SiteRecord) -> tuple[Block, Block]:
    """Return a promoted site's block, and the one that counts in a window."""
    assert record.home is not None
    assert record.learner is not None
    return record.home, record.learner


@needs_gdb
def test_backtraces_in_a_callee(target: LiveTarget, tmp_path: Path) -> None:
    """At a breakpoint in a callee: same functions, lines and return addresses as without us."""
    before = Witness.of(target.pid)
    plain = _run_gdb(target.pid, BREAK, tmp_path / "plain")
    assert isinstance(plain, list)
    assert len(plain) >= 2  # by the call and by the tail call
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        assert session.promote() == 4
        assert _run_gdb(target.pid, BREAK, tmp_path / "promoted") == plain
        assert session.detach(leave=True).outcome is DetachOutcome.LEFT
    assert _run_gdb(target.pid, BREAK, tmp_path / "left") == plain
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@needs_gdb
def test_a_core_file_has_blocks_in_it(target: LiveTarget, tmp_path: Path) -> None:
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        core = tmp_path / "core"
        code = STEP + f"\ngdb.execute('generate-core-file {core}', to_string=True)\n"
        _run_gdb(target.pid, code, tmp_path / "steps", WANTED=sorted(_blocks_in_use(session)))
    assert target.finish().startswith("wrong 0 rounds")
    command = ["gdb", "-q", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
    command += ["-ex", f"source {GDB_SCRIPT}", str(target.process.args[0]), str(core), "-ex", "bt"]
    shown = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
    ).stdout
    lines = [line for line in shown.splitlines() if line.startswith("#")][1:]
    assert "in optpoline block for " in lines[0], shown
    assert any(" in work (" in line for line in lines[1:]), shown
    assert " in start_thread (" in lines[-2], shown


# --- gdb and the controller at once


@contextmanager
def _attached_gdb(pid: int) -> Iterator[subprocess.Popen[str]]:
    """Hold a program with gdb; it runs, but cannot be traced by anybody else."""
    command = ["gdb", "-q", "-nx", "-iex", "set debuginfod enabled off", "-ex", "set confirm off"]
    command += ["-ex", "set pagination off", "-p", str(pid)]
    with subprocess.Popen(
        command,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as gdb:
        try:
            _tell_gdb(gdb, "echo attached\\n", "attached")
            _tell_gdb(gdb, "continue &", "Continuing")
            yield gdb
            _tell_gdb(gdb, "interrupt", "SIGINT")
            assert gdb.stdin is not None
            gdb.stdin.write("detach\nquit\n")
            gdb.stdin.close()
            gdb.wait(_TIMEOUT_S)
        finally:
            gdb.kill()


def _tell_gdb(gdb: subprocess.Popen[str], command: str, answer: str) -> None:
    """Give gdb a command and wait for what it says."""
    assert gdb.stdin is not None
    assert gdb.stdout is not None
    gdb.stdin.write(command + "\n")
    gdb.stdin.flush()
    said = ""
    for line in gdb.stdout:
        said += line
        if answer in line:
            return
    raise AssertionError(said)


@needs_gdb
def test_a_debugger_comes_during_a_session(target: LiveTarget) -> None:
    """Nothing can be stopped meanwhile: that is noted, all goes on, and is undone afterwards."""
    target.ask("1")
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        session.watch(0.1)
        with _attached_gdb(target.pid):
            target.ask("2")  # another workload, to which the sites' text is to be linked
            session.watch(4.0)
            assert any("gdb" in note or "trace" in note for note in session.notes), session.notes
            _check_goes_on(target, "2")
        session.watch(0.5)
        assert session.summary().hit_rate is not None
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@needs_gdb
def test_a_session_ends_under_a_debugger(target: LiveTarget) -> None:
    """It cannot undo anything then; what it leaves works, and can be undone later."""
    before = Witness.of(target.pid)
    session = optpoline.attach(target.pid)
    session.learn(LEARN_S)
    session.promote()
    with _attached_gdb(target.pid):
        with pytest.raises(optpoline.PermissionDenied, match="gdb"):
            session.detach()
        _check_goes_on(target, "3")
    assert arena_mappings(target.pid)
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
