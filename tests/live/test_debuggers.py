# SPDX-License-Identifier: Apache-2.0
"""gdb and perf see the program's own frames, and blocks by name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome, SessionState
from optpoline.patch.blocks import Block, point_back, redirect
from tests.live.conftest import BuildTarget, LiveTarget, StartTarget
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
    # Both: enough was seen, and this is inside a block. Without blocks all that the program
    # does must have been seen: a round of eight functions takes it some 1,600 instructions.
    is_enough = n > (1500 if wanted else 3500)
    if is_enough and wanted <= blocks.keys() and (block is not None or not wanted):
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
            point_back(learner)  # as a sampling window does; it led to home until now
            redirect(home, learner.addr)
            wanted[int(learner.addr)] = record
        _check_steps(_step(target.pid, tmp_path / "steps", set(wanted)), wanted, plain)
        _check_goes_on(target, phase)
        for record in promoted:
            home, learner = _home_and_learner(record)
            point_back(home)
            redirect(learner, home.addr)
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
    program = os.readlink(f"/proc/{target.pid}/exe")
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        core = tmp_path / "core"
        code = STEP + f"\ngdb.execute('generate-core-file {core}', to_string=True)\n"
        _run_gdb(target.pid, code, tmp_path / "steps", WANTED=sorted(_blocks_in_use(session)))
    assert target.finish().startswith("wrong 0 rounds")
    command = ["gdb", "-q", "-nx", "-batch", "-iex", "set debuginfod enabled off"]
    command += ["-ex", f"source {GDB_SCRIPT}", program, str(core), "-ex", "bt"]
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
        with _attached_gdb(target.pid) as gdb:
            target.ask("2")  # another workload, to which the sites' text is to be linked
            session.watch(4.0)
            assert any(f"process {gdb.pid} (gdb)" in note for note in session.notes), session.notes
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
    with _attached_gdb(target.pid) as gdb:
        result = session.detach()
        assert result.outcome is DetachOutcome.INCOMPLETE
        assert result.restored == 0
        assert session.summary().state is SessionState.PARTLY_RESTORED
        (note,) = result.notes
        assert f"process {gdb.pid} (gdb)" in note
        assert f"`optpoline detach {target.pid}`" in note
        _check_goes_on(target, "3")
    assert arena_mappings(target.pid)
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@needs_gdb
@pytest.mark.parametrize("when", ["learning", "promoting", "promoted"])
def test_the_command_ends_under_a_debugger(target: LiveTarget, when: str) -> None:
    """With a whole summary and document, which name the debugger and what to do later."""
    before = Witness.of(target.pid)
    learn_s = {"learning": _TIMEOUT_S, "promoting": 4.0, "promoted": LEARN_S}[when]
    args = ("attach", "--learn-seconds", learn_s, "--json", "-", target.pid)
    with start_cli(*args) as controller:
        wait_for_line(controller, "promoted " if when == "promoted" else "learning ")
        with _attached_gdb(target.pid) as gdb:
            if when != "promoting":  # which fails by itself
                controller.terminate()
            out, err = controller.communicate(timeout=_TIMEOUT_S)
            _check_goes_on(target, "3")
        assert controller.returncode == 7, err
    document = json.loads(out)
    assert document["state"] == "partly_restored"
    assert document["detach"]["outcome"] == "incomplete"
    assert document["n_sites"] == len(document["sites"]) == 4
    for text in (err, " ".join(document["notes"])):
        assert f"process {gdb.pid} (gdb)" in text
        assert f"`optpoline detach {target.pid}`" in text
    assert run_json("check", target.pid)["sound"]
    left = run_json("status", target.pid)["left_behind"]
    assert left["promoted"] == 4
    assert left["controller_alive"] is False
    # Nobody is there who would read what a counting block counts.
    states = {site["state"] for site in run_json("sites", target.pid)["sites"]}
    assert states == {"baseline" if when == "learning" else "promoted"}
    run_cli("detach", target.pid)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@needs_gdb
def test_a_session_ends_at_the_debuggers_prompt(target: LiveTarget) -> None:
    """Threads that stand run no code: the text is put back, and who holds the rest is told."""
    before = Witness.of(target.pid)
    args = ("attach", "--learn-seconds", LEARN_S, "--json", "-", target.pid)
    with start_cli(*args) as controller:
        wait_for_line(controller, "promoted ")
        with _attached_gdb(target.pid) as gdb:
            _tell_gdb(gdb, "interrupt", "SIGINT")
            controller.terminate()
            out, err = controller.communicate(timeout=_TIMEOUT_S)
            before.check_text(target.pid)
            _tell_gdb(gdb, "continue &", "Continuing")
        assert controller.returncode == 143, err
    document = json.loads(out)
    assert document["detach"]["outcome"] == "arena_left"
    (note,) = document["detach"]["notes"]
    assert f"process {gdb.pid} (gdb)" in note
    assert f"`optpoline detach {target.pid}`" in note
    assert note in err
    assert arena_mappings(target.pid)
    run_cli("detach", target.pid)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- perf


def _record(pid: int, path: Path, *args: str) -> Path:
    """Profile a program for a second; return the profile."""
    command = ["perf", "record", "-q", "-e", "cpu-clock:u", "-F", "2000", "-o", str(path)]
    command += [*args, "-p", str(pid), "--", "sleep", "1"]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False, cwd=path.parent
    )
    assert done.returncode == 0, done.stderr
    return path


def _read_stacks(profile: Path) -> Counter[tuple[str, ...]]:
    """Return how often each stack was sampled, innermost function first."""
    command = ["perf", "script", "-i", str(profile), "-F", "ip,sym"]
    text = subprocess.run(
        command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=True
    ).stdout
    samples = text.strip("\n").split("\n\n")
    return Counter(
        tuple(line.split(maxsplit=1)[1].strip() for line in sample.splitlines() if line.strip())
        for sample in samples
    )


def _name_blocks(profile: Path) -> None:
    """Do what the documentation says."""
    subprocess.run([sys.executable, str(PERF_SCRIPT), str(profile)], check=True)


def _common(stacks: Counter[tuple[str, ...]]) -> set[tuple[str, ...]]:
    """Return stacks that are no accident, those inside thunks and blocks left out."""
    return {
        stack
        for stack, n in stacks.items()
        if n >= 0.02 * stacks.total() and not stack[0].startswith(("__x86_indirect", "optpoline:"))
    }


@needs_perf
@pytest.mark.parametrize("graph", ["fp", "dwarf"])
def test_profiles_have_the_same_frames(target: LiveTarget, tmp_path: Path, graph: str) -> None:
    target.ask("3")
    args = ("--call-graph", graph if graph == "fp" else "dwarf,2048")
    plain = _read_stacks(_record(target.pid, tmp_path / "plain", *args))
    assert {stack[0] for stack in _common(plain)} >= {"work", "run"}
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        assert session.promote() == 4
        profile = _record(target.pid, tmp_path / "promoted", *args)
        _name_blocks(profile)
        promoted = _read_stacks(profile)
    for one, other in ((plain, promoted), (promoted, plain)):
        leaves = {stack[0] for stack in other}
        missing = {stack for stack in _common(one) if stack[0] in leaves} - other.keys()
        assert not missing
    assert {stack[0] for stack in _common(promoted)} >= {"work", "run"}
    _check_named(promoted)
    assert target.finish().startswith("wrong 0 rounds")


def _check_named(stacks: Counter[tuple[str, ...]]) -> None:
    """Every block that was sampled has the name of its site, and hot ones were."""
    names: Counter[str] = Counter()
    for stack, n in stacks.items():
        assert "[unknown]" not in stack[0]
        if stack[0].startswith("optpoline:"):
            names[stack[0]] += n
    assert names.total() >= 0.02 * stacks.total()
    assert {name.rpartition("+")[0] for name in names} <= {
        f"optpoline:{kind}:{function}"
        for kind in ("promoted", "counting")
        for function in ("work", "run", "tail")
    }


# --- the map of names


def _map_path(target: LiveTarget) -> Path:
    """Return where perf looks for names."""
    return Path(f"/tmp/perf-{target.pid}.map")


def _check_map(session: optpoline.Session, path: Path) -> None:
    """Every block that is in use has its line."""
    lines = dict(line.split(maxsplit=1) for line in path.read_text().splitlines())
    blocks = [b for arena in session.target.arenas for b in arena.blocks]
    assert blocks
    for block in blocks:
        symbol = session.target.symbol_at(block.site_addr)
        kind = block.kind.name.lower()
        assert lines[f"{block.addr:x}"] == f"{block.text_size:x} optpoline:{kind}:{symbol}"


@pytest.mark.parametrize("leave", [False, True])
def test_names_last_as_long_as_blocks(target: LiveTarget, leave: bool) -> None:
    path = _map_path(target)
    session = optpoline.attach(target.pid)
    session.learn(LEARN_S)
    assert path.exists()
    session.promote()
    session.watch(2.0)
    _check_map(session, path)
    status = path.stat()
    assert (status.st_uid, status.st_mode & 0o7777) == (os.geteuid(), 0o644)
    session.detach(leave=leave)
    assert path.exists() == leave
    if leave:
        assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
        assert not path.exists()
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("how", ["exit", "kill"])
def test_names_of_a_program_that_ends_go(target: LiveTarget, how: str) -> None:
    path = _map_path(target)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        assert path.exists()
        if how == "exit":
            target.finish()
        else:
            target.process.kill()
            target.process.wait()
        session.watch(5.0)
    assert not path.exists()


def test_a_map_of_the_program_itself_stays(target: LiveTarget) -> None:
    path = _map_path(target)
    path.write_text("7f0000001000 20 LazyCompile:*main\n")
    try:
        with optpoline.attach(target.pid) as session:
            session.learn(LEARN_S)
            session.promote()
            session.watch(0.2)
            assert any(str(path) in note for note in session.notes)
        assert path.read_text() == "7f0000001000 20 LazyCompile:*main\n"
    finally:
        path.unlink()
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to make namespaces")
def test_names_where_a_container_looks_for_them(build_target: BuildTarget, tmp_path: Path) -> None:
    """In the program's own /tmp, under its own process id, and owned by its user."""
    view = tmp_path / "view"
    view.mkdir()
    view.chmod(0o1777)
    tmp_path.chmod(0o755)
    shutil.copy(build_target("promote", *FLAGS), view / "promote")
    user = "setpriv --reuid=65534 --regid=65534 --clear-groups"
    script = f"mount --make-rprivate / && mount --bind {view} /tmp && exec {user} /tmp/promote 1"
    unshare = ["unshare", "--mount", "--pid", "--fork", "--kill-child", "sh", "-c", script]
    target = LiveTarget(unshare)
    try:
        children = Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text()
        path = view / "perf-1.map"
        with optpoline.attach(int(children)) as session:
            session.learn(LEARN_S)
            session.promote()
            session.watch(1.5)
            _check_map(session, path)
            assert path.stat().st_uid == 65534
        assert os.listdir(view) == ["promote"]
        assert target.finish().startswith("wrong 0 rounds")
    finally:
        with target.process as process:
            process.kill()
