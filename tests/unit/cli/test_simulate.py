# SPDX-License-Identifier: Apache-2.0
"""``optpoline simulate`` and ``record``: arguments, files, documents, exit statuses."""

from __future__ import annotations

import json
import os
from pathlib import Path
from xml.etree import ElementTree

import pytest

from optpoline.cli.main import main
from optpoline.errors import NoSites, OptpolineError, ProcessGone
from optpoline.promote.policies import POLICY_NAMES
from optpoline.simulate.trace_file import read_trace
from tests.unit.cli.fakes import FakeApi

SYNTHETIC = "alternating:sites=2,seconds=3"


def simulate(*args: str | Path) -> int:
    """Run the verb."""
    return main(["simulate", *map(str, args)], api=FakeApi())


def test_table_on_stdout(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--synthetic", SYNTHETIC) == 0
    out, err = capsys.readouterr()
    assert err == ""
    first = [line.split()[0] for line in out.splitlines()[2:-1]]
    assert sorted(first) == sorted([*POLICY_NAMES, "(static)", "(oracle)"])
    assert first[-2:] == ["(static)", "(oracle)"]


def test_document(capsys: pytest.CaptureFixture[str]) -> None:
    chosen = ("--policy", "llvm", "--policy", "cree", "--policy", "llvm")
    assert simulate("--synthetic", SYNTHETIC, "--json", "-", *chosen) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["command"]) == (1, "simulate")
    assert [one["name"] for one in document["policies"]] == ["llvm", "cree"]
    assert [one["name"] for one in document["ideals"]] == ["(static)", "(oracle)"]
    assert document["n_sites"] == 2
    assert document["seconds"] == 3.0
    assert document["policies"][0]["hit_rate"] == pytest.approx(2 / 3, abs=0.001)
    assert document["ideals"][0]["promoted"] is None


def test_settings(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--synthetic", SYNTHETIC, "--json", "-", "--policy", "llvm", "--policy", "bolt")
    assert simulate(*args, "--policy-set", "learn_s=0.3", "--policy-set", "bolt.learn_s=1.5") == 0
    llvm, bolt = json.loads(capsys.readouterr().out)["policies"]
    assert llvm["hit_rate"] == pytest.approx(0.9, abs=0.001)
    assert bolt["hit_rate"] == pytest.approx(0.5, abs=0.001)


def test_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    args = ("--synthetic", SYNTHETIC, "--json", "-", "--policy", "llvm")
    assert simulate(*args, "--repeat", "5") == 0
    document = json.loads(capsys.readouterr().out)
    assert document["seconds"] == 15.0
    assert document["policies"][0]["hit_rate"] == pytest.approx(14 / 15, abs=0.001)


def test_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "plot.svg"
    assert simulate("--synthetic", SYNTHETIC, "--plot", path) == 0
    root = ElementTree.fromstring(path.read_text())
    texts = [element.text or "" for element in root.iter("{http://www.w3.org/2000/svg}text")]
    assert all(any(text.startswith(name) for text in texts) for name in POLICY_NAMES)
    lines = [
        element
        for element in root.iter("{http://www.w3.org/2000/svg}path")
        if element.get("stroke-width") == "1.5"
    ]
    assert len(lines) == 2 * (len(POLICY_NAMES) + 2)
    capsys.readouterr()
    assert simulate("--synthetic", SYNTHETIC, "--plot", path) == 2
    assert "use --force" in capsys.readouterr().err
    assert simulate("--synthetic", SYNTHETIC, "--plot", path, "--force") == 0
    assert os.listdir(tmp_path) == ["plot.svg"]


def test_a_pipe_is_not_replaced(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    assert simulate("--synthetic", SYNTHETIC, "--plot", pipe, "--force") == 2
    assert pipe.is_fifo()
    assert f"{pipe} is no regular file" in capsys.readouterr().err


def test_projection(capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate("--project", "--json", "-") == 0
    document = json.loads(capsys.readouterr().out)
    shapes = {(one["sites"], one["cpus"]) for one in document["projections"]}
    assert {(1_000, 1), (1_000_000, 256)} <= shapes
    assert document["measured"]["decide_s"] > 0
    assert simulate("--project") == 0
    assert "measured here and now" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "one of: a trace"),
        (["t", "--synthetic", "zipf"], "one of: a trace"),
        (["t", "--project"], "one of: a trace"),
        (["--project", "--plot", "p.svg"], "nothing to plot"),
        (["--project", "--repeat", "2"], "--project takes no --repeat"),
        (["--project", "--cpus", "64"], "--project takes no --cpus"),
        # A default that is given is given, too.
        (["--seed", "1", "--project"], "--project takes no --seed"),
        (["--project", "--policy", "all"], "for one policy"),
        (["--synthetic", "nope"], "no synthetic workload"),
        (["--synthetic", "zipf", "--policy", "nope"], "no policy 'nope'"),
        (["--synthetic", "zipf", "--policy-set", "learn_s"], "NAME=VALUE"),
        (["--synthetic", "zipf", "--policy-set", "nope=1"], "'nope'"),
        (["--synthetic", "zipf", "--policy-set", "learn_s=x"], "learn_s"),
        (["--synthetic", "zipf", "--policy", "llvm", "--policy-set", "cree.min_hits=1"], "'cree'"),
        (["--synthetic", "zipf", "--plot", "-"], "stdout takes no file of --plot"),
        (["--synthetic", "zipf", "--cpus", "0"], "0"),
    ],
)
def test_usage(args: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(*args) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert words in err


def test_no_such_trace(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert simulate(tmp_path / "none") == 1
    assert "No such file" in capsys.readouterr().err
    (tmp_path / "text").write_text("hello")
    assert simulate(tmp_path / "text", "--json", "-") == 1
    out, err = capsys.readouterr()
    assert "is not an optpoline trace" in err
    assert json.loads(out)["error"]["exit_code"] == 1


# --- record


def record(api: FakeApi, *args: str | Path) -> int:
    """Run the verb."""
    return main(["record", *map(str, args)], api=api)


def test_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api, path = FakeApi(), tmp_path / "trace"
    assert record(api, "4711", "--trace", path, "--duration", "2", "--json", "-") == 0
    out, err = capsys.readouterr()
    assert api.attached == [4711]
    # Learning takes a quarter of so short a time.
    assert api.session.calls == ["learn 0.5", "record 1.5", "detach"]
    assert read_trace(path).n_branches == 2
    document = json.loads(out)
    assert (document["command"], document["pid"]) == ("record", 4711)
    assert (document["n_branches"], document["n_dropped"]) == (2, 1)
    assert document["detach"]["outcome"] == "clean"
    assert document["exit_status"] is None
    assert "2 branches of 1 site in 1 burst" in err
    assert "came faster" in err
    assert "a note" in err


def test_recorded_trace_is_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    assert record(FakeApi(), "--trace", path, "4711") == 0
    assert simulate(path) == 0
    assert "1 site" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "words"),
    [
        (["4711"], "--trace"),
        (["--trace", "t"], "PID"),
        (["--trace", "t", "lua"], "write -- before a command"),
        (["--trace", "t", "1", "2"], "not a process id"),
        (["--trace", "t", "0"], "not a process id"),
        (["--trace", "t", "4711", "--burst-ms", "0"], "milliseconds above 0"),
        (["--trace", "-", "4711"], "stdout takes no file of --trace"),
        (["--trace", "t", "4711", "--duration", "x"], "number of seconds"),
    ],
)
def test_record_usage(
    args: list[str],
    words: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    api = FakeApi()
    assert record(api, *args) == 2
    assert words in capsys.readouterr().err
    assert api.attached == []
    assert os.listdir(tmp_path) == []


def test_existing_trace_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    path.write_text("mine")
    api = FakeApi()
    assert record(api, "4711", "--trace", path) == 2
    assert path.read_text() == "mine"
    assert api.attached == []
    assert record(api, "4711", "--trace", path, "--force") == 0
    assert read_trace(path).n_branches == 2


@pytest.mark.parametrize(
    ("stage", "error", "status"),
    [("learn", ProcessGone(4711), 4), ("record", OptpolineError("no"), 1)],
)
def test_failure_restores_and_leaves_no_file(
    stage: str, error: OptpolineError, status: int, tmp_path: Path
) -> None:
    api = FakeApi()
    api.session.errors[stage] = error
    assert record(api, "4711", "--trace", tmp_path / "trace") == status
    assert api.session.calls[-1] == "detach"
    assert os.listdir(tmp_path) == []


def test_no_site(tmp_path: Path) -> None:
    api = FakeApi(attach_errors=[NoSites("process 4711 has no retpoline site")])
    assert record(api, "4711", "--trace", tmp_path / "trace") == 3
    assert os.listdir(tmp_path) == []


def test_command_that_does_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "trace"
    assert record(FakeApi(), "--trace", path, "--", str(tmp_path / "none")) == 127
    assert "no such program" in capsys.readouterr().err


def test_status_of_a_command_is_passed_on(tmp_path: Path) -> None:
    path = tmp_path / "trace"
    assert record(FakeApi(), "--trace", path, "--", "sh", "-c", "sleep 1; exit 7") == 7
    assert read_trace(path).program == "sh -c 'sleep 1; exit 7'"


def test_command_without_sites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(attach_errors=[NoSites("none")] * 100)
    assert record(api, "--trace", tmp_path / "trace", "--", "sh", "-c", "sleep 0.3") == 125
    assert "before a site of it could be recorded" in capsys.readouterr().err
