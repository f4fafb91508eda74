# SPDX-License-Identifier: Apache-2.0
"""Programs that fork, execute, load modules, make threads, take signals, and sleep."""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest

import optpoline
from optpoline.controller import first_window
from optpoline.controller.events import Event, EventKind
from optpoline.controller.summary import DetachOutcome, SessionState, SiteState
from optpoline.errors import ProcessGone
from optpoline.model import Addr
from optpoline.process.memory import RemoteMemory
from tests.live.conftest import BuildTarget, StartTarget
from tests.live.failing_stops import fail_at
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

PLUGIN = ("-shared", "-fPIC", *RETPOLINE)


def _promote(pid: int, learn_s: float = 0.1) -> optpoline.Session:
    """Attach and promote."""
    session = optpoline.attach(pid)
    session.learn(learn_s)
    session.promote()
    return session


# --- signals, sleeps, threads


@pytest.mark.parametrize(
    ("mode", "n_cycles"),
    [
        ("nanosleep", 6),
        ("poll", 6),
        ("epoll", 6),
        ("timer", 10),
        ("jump", 10),
        ("short", 20),
        ("spawn", 10),
    ],
)
def test_it_cannot_tell(start_target: StartTarget, mode: str, n_cycles: int) -> None:
    """Attach and detach over and over; the program checks its results, errno and times."""
    target = start_target("life", mode, "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    for _ in range(n_cycles):
        with optpoline.attach(target.pid) as session:
            session.learn(0.04)
            session.promote()
            session.watch(0.02)
            result = session.detach()
        if mode == "spawn":
            # Who waits for a child of its own (vfork) comes back into a block when that has
            # run, which takes as long as others leave the machine to it.
            while result.outcome is DetachOutcome.ARENA_LEFT:
                result = optpoline.restore(target.pid)
        assert result.outcome is DetachOutcome.CLEAN, result
        if mode != "spawn":  # its children come and go with pipes of their own
            before.check(target.pid)
    before.check_text(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_asleep_all_the_time(start_target: StartTarget) -> None:
    target = start_target("life", "rest", flags=RETPOLINE)
    target.wait_for_state("S")
    before = Witness.of(target.pid)
    for _ in range(5):
        with optpoline.attach(target.pid) as session:
            session.learn(0.03)
            session.promote()
            assert session.summary().promoted == 0
        before.check(target.pid)
    assert target.finish() == "wrong 0 rounds 1\n"


@pytest.mark.parametrize("mode", ["alt", "context"])
def test_a_handler_that_blocks_inside_a_block(start_target: StartTarget, mode: str) -> None:
    target = start_target("life", mode, "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    session = _promote(target.pid)
    arena = session.target.arenas[0]
    assert target.ask_to_block(arena.code_start, arena.code_end) == "blocked"
    result = session.detach()
    assert result.outcome is DetachOutcome.ARENA_LEFT
    assert any("stays mapped" in note for note in result.notes)
    before.check_text(target.pid)
    assert arena_mappings(target.pid)
    assert optpoline.restore(target.pid).outcome is DetachOutcome.ARENA_LEFT
    assert target.ask("release") == "released"
    last = optpoline.restore(target.pid)
    # No thread holds it now; the frame that is left on the other stack may, by its looks.
    assert last.outcome is DetachOutcome.CLEAN or "perhaps a saved PC" in last.notes[0]
    before.check_text(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- exit, exec, run


@pytest.mark.parametrize("when", ["attaching", "learning", "promoting", "watching"])
def test_exit_during_a_session(start_target: StartTarget, when: str) -> None:
    delays_s = {
        "attaching": [0.001 * n for n in range(0, 60, 6)],
        "learning": [0.08, 0.12],
        "promoting": [0.0],
        "watching": [0.0],
    }[when]
    for delay_s in delays_s:
        target = start_target("life", "spin", "2", flags=RETPOLINE)
        timer = threading.Timer(delay_s, os.kill, (target.pid, signal.SIGKILL))
        if when in ("attaching", "learning"):
            timer.start()
        try:
            session = optpoline.attach(target.pid)
        except ProcessGone:
            timer.join()
            continue
        try:
            session.learn(1.0 if when in ("attaching", "learning") else 0.05)
            if when == "promoting":
                os.kill(target.pid, signal.SIGKILL)
            session.promote()
            timer = threading.Timer(0.1, os.kill, (target.pid, signal.SIGKILL))
            timer.start()
            assert session.watch(5.0) is SessionState.EXITED
        except ProcessGone:
            assert when != "watching"
        if timer.ident is not None:
            timer.join()
        assert session.detach().outcome is DetachOutcome.GONE
        assert session.summary().state is SessionState.EXITED


def test_exit_status_of_attach(start_target: StartTarget) -> None:
    target = start_target("life", "spin", flags=RETPOLINE)
    with start_cli("attach", "--json", "-", target.pid) as controller:
        wait_for_line(controller, "promoted ")
        target.tell("exit")
        out, err = controller.communicate(timeout=20)
    assert controller.returncode == 0, err
    assert '"state": "exited"' in out
    assert target.process.wait() == 7


@pytest.mark.parametrize("when", ["learning", "watching"])
def test_exec_during_a_session(start_target: StartTarget, when: str) -> None:
    target = start_target("life", "spin", flags=RETPOLINE)
    with optpoline.attach(target.pid) as session:
        if when == "learning":
            asker = threading.Timer(0.1, target.ask, ("exec",))
            asker.start()
            session.learn(0.4)
            asker.join()
            with pytest.raises(ProcessGone, match="runs a new program"):
                session.promote()
        else:
            session.learn(0.4)
            session.promote()
            assert target.ask("exec") == "ready"
            assert session.watch(10.0) is SessionState.EXECED
        assert session.detach().outcome is DetachOutcome.GONE
        assert session.summary().state is SessionState.EXECED
    assert arena_mappings(target.pid) == []
    # The new program can be attached to as any other.
    before = Witness.of(target.pid)
    _promote(target.pid).detach()
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (["true"], 0),
        (["sh", "-c", "exit 42"], 42),
        (["sh", "-c", "kill -TERM $$"], 128 + signal.SIGTERM),
        (["/"], 126),
        (["/nonexistent/program"], 127),
    ],
)
def test_run_passes_on_the_status(command: list[str], status: int) -> None:
    run_cli("run", "-q", "--", *command, status=status)


def test_run_fails_by_itself(tmp_path: Path) -> None:
    existing = tmp_path / "report.json"
    existing.write_text("mine")
    run_cli("run", "--json", existing, "--", "true", status=125)
    run_cli("run", "--no-such-option", "--", "true", status=125)
    assert existing.read_text() == "mine"


@pytest.mark.parametrize("wrapper", ["none", "sh", "env"])
def test_run_promotes(build_target: BuildTarget, wrapper: str) -> None:
    path = str(build_target("life", *RETPOLINE))
    command = {
        "none": [path, "spin", "1"],
        "sh": ["sh", "-c", f"sleep 0.2; exec {path} spin 1"],
        "env": ["env", "A=B", path, "spin", "1"],
    }[wrapper]
    with start_cli("run", "--learn-seconds", "0.2", "--", *command, stdin=True) as run:
        wait_for_line(run, "promoted ")
        out, err = run.communicate("exit\n", timeout=20)
    assert run.returncode == 7, (out, err)
    assert out == "ready\n"


def test_run_promotes_after_its_own_exec(build_target: BuildTarget) -> None:
    path = str(build_target("life", *RETPOLINE))
    with start_cli(
        "run", "--json", "-", "--learn-seconds", "1", "--", path, "spin", stdin=True
    ) as run:
        wait_for_line(run, "learning ")
        assert run.stdin is not None
        run.stdin.write("exec\n")
        run.stdin.flush()
        wait_for_line(run, "learning ")
        wait_for_line(run, "promoted ")
        out, err = run.communicate("exit\n", timeout=20)
    assert run.returncode == 7, (out, err)


# --- children


def test_a_child_keeps_running(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    session = _promote(target.pid)
    child = int(target.ask("fork").split()[1])
    session.watch(0.1)
    assert session.detach().outcome is DetachOutcome.CLEAN
    before.check_text(target.pid)
    assert arena_mappings(target.pid) == []
    # The child has the text as it was when it was made, and its own mapping of the arena.
    assert before.changed_bytes(child)
    left = run_json("status", child)["left_behind"]
    assert left["promoted"] > 0
    run_cli("detach", child)
    before.check_text(child)
    assert arena_mappings(child) == []
    status, line = target.ask("join").split(" ", 2)[1:]
    assert status == "0"
    assert line.startswith("wrong 0 rounds")
    assert target.finish().startswith("wrong 0 rounds")


def test_a_child_made_while_learning_is_attached_to(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        timer = threading.Timer(0.1, lambda: answers.append(target.ask("fork")))
        answers: list[str] = []
        timer.start()
        session.learn(0.3)
        timer.join()
        session.promote()
        child = int(answers[0].split()[1])
        _check_not_counting(session, child)
        # Another session, with the child, while this one goes on.
        with _promote(child, 0.4) as other:
            assert other.summary().promoted > 0
        before.check_text(child)
        assert arena_mappings(child) == []
    before.check_text(target.pid)
    assert target.ask("join").startswith("status 0 wrong 0 rounds")
    assert target.finish().startswith("wrong 0 rounds")


def _check_not_counting(session: optpoline.Session, child: int) -> None:
    """Check that a child with the text of the learning window goes where its parent goes."""
    n_led_on = 0
    with RemoteMemory(child) as memory:
        for record in session.records:
            disp = memory.read(record.site.disp_addr, 4)
            block = record.site.end + int.from_bytes(disp, "little", signed=True)
            if not record.arena.addr <= block < record.arena.end:
                continue
            head = record.arena.read(Addr(block), 5)
            assert head[:1] == b"\xe9"  # jmp rel32
            dst = block + 5 + int.from_bytes(head[1:], "little", signed=True)
            assert dst == (record.thunk_addr if record.home is None else record.home.addr)
            n_led_on += 1
    assert n_led_on > 0


# --- modules


def test_modules_that_come_and_go(start_target: StartTarget, build_target: BuildTarget) -> None:
    plugin = build_target("plugin", *PLUGIN)
    target = start_target("life", "spin", "1", flags=(*RETPOLINE, "-ldl"))
    before = Witness.of(target.pid)
    events: list[Event] = []
    config = optpoline.Config(learn_s=0.1, maps_every_s=0.1)
    with optpoline.attach(target.pid, config=config, on_event=events.append) as session:
        session.learn()
        session.promote()
        for number in range(5):
            assert target.ask(f"open {plugin}").startswith("opened")
            session.watch(0.6)
            sites = [s for s in session.summary().sites if s.module == str(plugin)]
            assert len([s for s in sites if s.state.value == "promoted"]) >= 2, number
            assert target.ask("close") == "closed"
            if number % 2:
                # Back at once, with nothing in between for us to see.
                target.ask(f"open {plugin}")
                session.watch(0.6)
                target.ask("close")
            session.watch(0.3)
            assert not [s for s in session.summary().sites if s.module == str(plugin)]
    kinds = [event.kind for event in events]
    assert kinds.count(EventKind.MODULE_ADDED) >= 5
    assert kinds.count(EventKind.MODULE_GONE) >= 5
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_module_is_loaded_between_attaching_and_watching(
    start_target: StartTarget, build_target: BuildTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found, and the watch goes on, though a stop between its groups fails."""
    monkeypatch.setattr(first_window, "GROUP_SITES", 1)
    plugin = build_target("plugin", *PLUGIN)
    target = start_target("life", "spin", "1", flags=(*RETPOLINE, "-ldl"))
    before = Witness.of(target.pid)
    config = optpoline.Config(learn_s=0.2, maps_every_s=0.1, relink_after_s=0.1)
    with optpoline.attach(target.pid, config=config) as session:
        assert target.ask(f"open {plugin}").startswith("opened")
        session.learn(0.1)
        session.promote()
        fail_at(monkeypatch, 2)
        assert session.watch(1.2) is SessionState.WATCHING
        assert any("did not stop" in note for note in session.notes)
        assert [r for r in session.records if r.site.module == str(plugin)]
        assert not [r for r in session.records if r.state is SiteState.LEARNING]
        assert all(record.home is record.active for record in session.records)
    target.ask("close")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_module_is_there_at_the_end(start_target: StartTarget, build_target: BuildTarget) -> None:
    plugin = build_target("plugin", *PLUGIN)
    target = start_target("life", "spin", "1", flags=(*RETPOLINE, "-ldl"))
    target.ask(f"open {plugin}")
    before = Witness.of(target.pid)
    with _promote(target.pid) as session:
        promoted = [s.module for s in session.summary().sites if s.state.value == "promoted"]
        assert promoted.count(str(plugin)) >= 2
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    target.ask("close")
    assert target.finish().startswith("wrong 0 rounds")


def test_a_module_whose_directory_is_renamed(
    start_target: StartTarget, build_target: BuildTarget, tmp_path: Path
) -> None:
    directory = tmp_path / "before"
    directory.mkdir()
    plugin = shutil.copy(build_target("plugin", *PLUGIN), directory / "plugin.so")
    target = start_target("life", "spin", "1", flags=(*RETPOLINE, "-ldl"))
    assert target.ask(f"open {plugin}").startswith("opened")
    before = Witness.of(target.pid)
    config = optpoline.Config(learn_s=0.1, maps_every_s=0.1)
    with optpoline.attach(target.pid, config=config) as session:
        session.learn()
        session.promote()
        n_sites, n_promoted = len(session.sites), session.summary().promoted
        assert n_promoted
        directory.rename(tmp_path / "after")
        session.watch(0.5)
        assert len(session.sites) == len(session.records) == n_sites
        assert session.summary().promoted == n_promoted
    (tmp_path / "after").rename(directory)  # the witness knows modules by path
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
