# SPDX-License-Identifier: Apache-2.0
"""The command line on real programs: what it writes where, and how it ends."""

from __future__ import annotations

import json
import os
import pty
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.live.conftest import BuildTarget, StartTarget
from tests.live.witness import (
    CLI,
    RETPOLINE,
    Witness,
    arena_mappings,
    run_cli,
    run_json,
    start_cli,
    wait_for_line,
)

pytestmark = pytest.mark.live

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "json.md"

QUICK = ("--learn-seconds", "0.4")


def _documented_fields(heading: str, after: str) -> set[str]:
    """Return the fields in the table that follows a line of docs/json.md."""
    text = DOCS.read_text().split(f"## {heading}\n", 1)[1].split("\n## ", 1)[0]
    fields: set[str] = set()
    for line in text.split(after, 1)[1].strip().splitlines():
        if not line.startswith("|"):
            break
        if line.startswith("| `"):
            fields.add(line.split("`")[1])
    assert fields
    return fields


def test_attach_document(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    report = tmp_path / "report.json"
    done = run_cli("attach", *QUICK, "--duration", "1.2", "--json", report, target.pid)
    assert done.stdout == ""
    document = json.loads(report.read_text())
    assert document.keys() == _documented_fields("`attach` and `run`", "\n")
    assert document["command"] == "attach"
    assert document["pid"] == target.pid
    assert document["state"] == "restored"
    assert document["promoted"] >= 3
    assert document["hit_rate"] > 0.99
    assert document["stops"] >= 3
    assert 0 < document["stop_ms_max"] <= document["stop_ms_total"]
    assert 0.2 <= document["learning_s"] < 0.6
    assert document["detach"]["outcome"] == "clean"
    assert document["detach"]["restored"] == document["promoted"]
    site_fields = _documented_fields("`attach` and `run`", "A site:\n")
    for site in document["sites"]:
        assert site.keys() == site_fields
        assert site["state"] in ("promoted", "baseline", "refused")
        for one in site["targets"]:
            assert one.keys() == {"address", "function", "share", "promoted"}
    shares = [sum(t["share"] for t in s["targets"]) for s in document["sites"]]
    assert all(share == pytest.approx(1.0, abs=0.02) for share in shares if share)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_documents_on_stdout(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    sites = run_json("sites", target.pid)
    assert sites["n_sites"] == len(sites["sites"]) >= 4
    assert run_json("doctor", target.pid)["attachable"] is True
    assert run_json("status", target.pid)["left_behind"] is None
    assert run_json("detach", target.pid)["detach"] is None
    before.check(target.pid)
    document = run_json("attach", *QUICK, "--duration", "1.2", target.pid)
    assert document["n_sites"] == sites["n_sites"]
    assert {s["address"] for s in document["sites"]} == {s["address"] for s in sites["sites"]}
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize(
    ("line", "number", "status"),
    [
        ("attached: ", signal.SIGINT, 0),
        ("learning ", signal.SIGINT, 0),
        ("promoted ", signal.SIGINT, 0),
        ("promoted ", signal.SIGTERM, 143),
        ("learning ", signal.SIGHUP, 129),
    ],
)
def test_signals_restore(
    start_target: StartTarget, line: str, number: signal.Signals, status: int
) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with start_cli("attach", "--learn-seconds", "0.5", target.pid) as controller:
        wait_for_line(controller, line)
        controller.send_signal(number)
        # The second one changes nothing.
        controller.send_signal(number)
        _, err = controller.communicate(timeout=20)
    assert controller.returncode == status, err
    assert "restored: every byte is as it was before" in err
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_leave_then_status_then_detach(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    document = run_json("attach", "--leave", *QUICK, "--duration", "1.2", target.pid)
    assert document["state"] == "left"
    assert document["detach"]["outcome"] == "left"
    assert before.changed_bytes(target.pid)
    left = run_json("status", target.pid)["left_behind"]
    assert left["promoted"] == document["promoted"] >= 3
    assert left["controller_alive"] is False
    assert left["arenas"] == 1
    assert "promoted" in run_cli("status", target.pid).stdout
    # Another phase goes on being right without anybody watching.
    target.ask("4")
    detach = run_json("detach", target.pid)["detach"]
    assert detach["outcome"] == "clean"
    assert detach["restored"] == left["promoted"]
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_leave_then_attach(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    # Too short to promote: what is to be left is made first.
    assert run_json("attach", "--leave", "--duration", "0.1", target.pid)["promoted"] >= 3
    target.ask("4")
    document = run_json("attach", *QUICK, "--duration", "1.2", target.pid)
    assert document["promoted"] >= 3
    assert document["state"] == "restored"
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("duration_s", [0.0, 0.3, 1.5])
def test_duration_counts_from_the_attach(start_target: StartTarget, duration_s: float) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with start_cli("attach", "--duration", duration_s, target.pid) as controller:
        wait_for_line(controller, "attached: ")
        begin_s = time.monotonic()
        wait_for_line(controller, "restored: ")
        elapsed_s = time.monotonic() - begin_s
    assert duration_s - 0.05 <= elapsed_s < duration_s + 1.0
    assert controller.returncode == 0
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def _run_on_terminal(*args: str | int) -> str:
    """Run a command with a terminal for its words; return all that was shown there."""
    master, terminal = pty.openpty()
    with subprocess.Popen([*CLI, *map(str, args)], stderr=terminal, stdout=subprocess.PIPE) as cli:
        os.close(terminal)
        shown = b""
        try:
            while data := os.read(master, 4096):
                shown += data
        except OSError:
            pass  # EIO: nobody has the terminal open any more
    os.close(master)
    assert cli.returncode == 0
    return shown.decode()


def test_progress_on_a_terminal_only(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    args = ("attach", *QUICK, "--duration", "1.2", target.pid)
    shown = _run_on_terminal(*args)
    assert "\r\x1b[K" in shown
    assert " · " in shown
    assert " · " not in _run_on_terminal(*args, "--no-progress")
    piped = run_cli(*args).stderr
    assert " · " not in piped
    assert "\r" not in piped
    assert run_cli(*args, "-q").stderr == ""
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_reader_that_goes_away(start_target: StartTarget) -> None:
    target = start_target("promote", "1", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with start_cli("attach", *QUICK, "--duration", "1.2", target.pid) as controller:
        assert controller.stderr is not None
        wait_for_line(controller, "attached: ")
        controller.stderr.close()
        assert controller.wait(timeout=20) == 0
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_nothing_hot_is_no_error(start_target: StartTarget) -> None:
    target = start_target("life", "rest", flags=RETPOLINE)
    before = Witness.of(target.pid)
    done = run_cli("attach", *QUICK, "--duration", "1.2", "--json", "-", target.pid)
    document = json.loads(done.stdout)
    assert document["promoted"] == 0
    assert document["hit_rate"] is None
    said = done.stderr.splitlines()
    # Scripts wait for a line that begins with "promoted ".
    assert not [line for line in said if line.startswith("promoted ")]
    assert [line for line in said if line.startswith("nothing to promote yet: no site was reached")]
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_run_document(build_target: BuildTarget, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    path = build_target("promote", *RETPOLINE)
    with start_cli("run", *QUICK, "--json", report, "--", path, "1", stdin=True) as run:
        wait_for_line(run, "promoted ")
        out, _ = run.communicate("3\n", timeout=20)
    assert run.returncode == 0
    assert out.startswith("ready\nok ")
    assert "wrong 0 rounds" in out
    document = json.loads(report.read_text())
    assert document["command"] == "run"
    assert document["state"] == "exited"
    assert document["exit_status"] == 0
    assert document["promoted"] >= 3


def test_run_let_go_before_the_end(build_target: BuildTarget) -> None:
    path = build_target("promote", *RETPOLINE)
    with start_cli("run", *QUICK, "--duration", "1.2", "-v", "--", path, "1", stdin=True) as run:
        wait_for_line(run, "promoted ")
        child = int(Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()[0])
        deadline_s = time.monotonic() + 10
        while arena_mappings(child):
            assert time.monotonic() < deadline_s
            time.sleep(0.02)
        # Told while the program still runs.
        wait_for_line(run, "restored: ")
        out, err = run.communicate("", timeout=20)
    assert run.returncode == 0, err
    assert "wrong 0 rounds" in out


def test_run_passes_signals_on(build_target: BuildTarget) -> None:
    path = build_target("promote", *RETPOLINE)
    with start_cli("run", *QUICK, "--", path, "1", stdin=True) as run:
        wait_for_line(run, "learning ")
        run.send_signal(signal.SIGTERM)
        run.communicate(timeout=20)
    assert run.returncode == 128 + signal.SIGTERM


def test_run_of_a_launcher_names_it(build_target: BuildTarget) -> None:
    path = build_target("promote", *RETPOLINE)
    # The second command keeps the shell from replacing itself by the first.
    command = ("sh", "-c", f"{path} 1; exit 3")
    with start_cli("run", "--", *command, stdin=True) as run:
        assert run.stderr is not None
        said = [run.stderr.readline() for _ in range(3)]
        out, _ = run.communicate("3\n", timeout=20)
    assert run.returncode == 3
    assert "wrong 0 rounds" in out
    assert said[0].startswith("not promoted: process ")
    assert " (sh) has no retpoline site in its " in said[0]
    assert "not built with retpolines" in said[1]
    assert "put `optpoline run --` before that" in said[2]
