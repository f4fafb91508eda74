# SPDX-License-Identifier: Apache-2.0
"""The harness: what is run, what is printed and written, and the exit status."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import pytest

import torture.__main__ as harness
from torture.errors import MissingTool, TortureError
from torture.row import Figure, Outcome, Scale
from torture.rows import NAMES, load_row


@dataclass(frozen=True, slots=True, kw_only=True)
class FakeRow:
    """A row whose figure, or failure, is given."""

    value: int = 0
    error: Exception | None = None
    name: str = "fake"
    about: str = "nothing [at] all"
    quick_s: float = 1.0
    full_s: float = 50.0

    def run(self, scale: Scale) -> Outcome:
        if self.error is not None:
            raise self.error
        figure = Figure(
            name="wrong [results]", value=str(self.value), bar="0", is_met=self.value == 0
        )
        reported = Figure(name="seen", value="3", bar="", is_met=None)
        return Outcome(
            row=self.name,
            scale=f"{scale.of(2000)} of 2,000 cycles",
            figures=(figure, reported),
            notes=(f"seed {scale.seed}",),
            seconds=0.5,
        )


def run(
    monkeypatch: pytest.MonkeyPatch, path: Path, rows: dict[str, FakeRow], *options: str
) -> int:
    monkeypatch.setattr(harness, "ROOT", path.parent)
    monkeypatch.setattr(harness, "RESULTS", path)
    monkeypatch.setattr(harness, "NAMES", tuple(rows))
    monkeypatch.setattr(harness, "load_row", rows.__getitem__)
    return harness.main(options)


def test_all_met(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "torture.json"
    assert run(monkeypatch, path, {"fake": FakeRow()}, "--seed", "7") == 0
    said = capsys.readouterr().out
    assert "2 % of the full run, seed 7" in said
    assert "40 of 2,000 cycles" in said
    assert "wrong [results]" in said
    assert "MISSED" not in said
    row = json.loads(path.read_text())["runs"]["quick"]["fake"]
    assert (row["seed"], row["scale"], row["verdict"]) == (7, "40 of 2,000 cycles", "met")
    assert [figure["verdict"] for figure in row["figures"]] == ["met", "reported"]


def test_a_missed_bar_is_told_and_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = {"bad": FakeRow(name="bad", value=1), "good": FakeRow(name="good")}
    path = tmp_path / "torture.json"
    assert run(monkeypatch, path, rows, "--full") == 1
    said = capsys.readouterr().out
    assert "in full" in said
    assert "2 rows in 1 s: MISSED: bad\n" in said
    written = json.loads(path.read_text())["runs"]["full"]
    assert {name: row["verdict"] for name, row in written.items()} == {
        "bad": "MISSED",
        "good": "met",
    }


@pytest.mark.parametrize(
    ("error", "word"),
    [
        (MissingTool("nginx", "nginx-light"), "nginx is not installed: apt install nginx-light"),
        (TortureError("gcc refuses calls.c"), "gcc refuses calls.c"),
        (ZeroDivisionError("a mistake"), "ZeroDivisionError: a mistake"),
    ],
)
def test_a_row_that_fails_does_not_cost_the_others(
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    error: Exception,
    word: str,
) -> None:
    rows = {"bad": FakeRow(name="bad", error=error), "good": FakeRow(name="good")}
    path = tmp_path / "torture.json"
    assert run(monkeypatch, path, rows) == 1
    assert word in capsys.readouterr().out
    written = json.loads(path.read_text())["runs"]["quick"]
    assert written["bad"]["verdict"] == "MISSED"
    assert word in written["bad"]["notes"][0]
    assert written["good"]["verdict"] == "met"


def test_a_run_replaces_only_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    path = tmp_path / "torture.json"
    rows = {"a": FakeRow(name="a"), "b": FakeRow(name="b", value=1)}
    run(monkeypatch, path, rows, "--full", "--seed", "1")
    run(monkeypatch, path, rows, "--seed", "2", "--only", "b")
    runs = json.loads(path.read_text())["runs"]
    assert {run: sorted(rows) for run, rows in runs.items()} == {"full": ["a", "b"], "quick": ["b"]}
    assert runs["full"]["b"]["seed"] == 1


@pytest.mark.parametrize("only", ["nonsense", "calls,nonsense", ","])
def test_unknown_rows_are_refused(only: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        harness.main(["--only", only])
    assert end.value.code == 2
    assert "no such row" in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_every_row_can_be_loaded(name: str) -> None:
    row = load_row(name)
    assert row.name == name
    assert 0 < row.quick_s <= row.full_s
    assert row.about


def test_the_short_run_takes_about_two_minutes() -> None:
    assert sum(load_row(name).quick_s for name in NAMES) <= 210


@pytest.mark.parametrize(("share", "number"), [(1.0, 500), (0.1, 50), (0.001, 10)])
def test_scale(share: float, number: int) -> None:
    assert Scale(share=share, seed=0).of(500, least=10) == number


@pytest.mark.parametrize("share", [0.0, -1.0, 1.5])
def test_a_share_is_a_share(share: float) -> None:
    with pytest.raises(ValueError, match="not within"):
        Scale(share=share, seed=0)
