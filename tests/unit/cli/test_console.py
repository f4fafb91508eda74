# SPDX-License-Identifier: Apache-2.0
"""Words on stderr, the progress line, the machine's checks."""

from __future__ import annotations

import io
import os
from pathlib import Path

import pytest

from optpoline.cli.console import Console, style_for
from optpoline.cli.machine import check_machine
from optpoline.process.checks import CheckStatus
from optpoline.report.table import Style


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


class Broken(io.StringIO):
    """A stream whose reader went away."""

    def write(self, text: str) -> int:
        raise BrokenPipeError


def test_progress_is_one_line_that_words_replace() -> None:
    stream = Terminal()
    console = Console(stream, Style(width=20))
    console.progress("a" * 30)
    console.progress("b")
    console.say("word")
    console.say("word")
    console.close_progress()
    cut = "a" * 9 + "…" + "a" * 9
    assert stream.getvalue() == f"{cut}\r\x1b[Kb\r\x1b[Kword\nword\n"


def test_no_progress_where_it_does_not_belong() -> None:
    pipe, quiet, refused = io.StringIO(), Terminal(), Terminal()
    for console in (
        Console(pipe, Style()),
        Console(quiet, Style(), quiet=True),
        Console(refused, Style(), progress=False),
    ):
        assert not console.has_progress
        console.progress("x")
    assert pipe.getvalue() == quiet.getvalue() == refused.getvalue() == ""


def test_quiet_still_shows_errors() -> None:
    stream = io.StringIO()
    console = Console(stream, Style(), quiet=True, verbose=True)
    console.say("a")
    console.say_more("b")
    console.say_all(["c"])
    console.error("d", "e")
    assert stream.getvalue() == "optpoline: error: d\n  e\n"


def test_reader_that_went_away_ends_nothing() -> None:
    console = Console(Broken(), Style())
    console.say("x")
    console.error("x", "y")
    closed = io.StringIO()
    closed.close()
    Console(closed, Style()).say("x")


@pytest.mark.parametrize(
    ("colour", "environ", "terminal", "expected"),
    [
        ("auto", {}, True, True),
        ("auto", {}, False, False),
        ("auto", {"NO_COLOR": "1"}, True, False),
        ("auto", {"NO_COLOR": ""}, True, True),
        ("auto", {"FORCE_COLOR": "1"}, False, True),
        ("auto", {"FORCE_COLOR": "0"}, False, False),
        ("auto", {"CLICOLOR_FORCE": "1"}, False, True),
        ("auto", {"NO_COLOR": "1", "CLICOLOR_FORCE": "1"}, True, False),
        ("auto", {"TERM": "dumb"}, True, False),
        ("auto", {"CLICOLOR": "0"}, True, False),
        ("always", {"NO_COLOR": "1"}, False, True),
        ("never", {"FORCE_COLOR": "1"}, True, False),
    ],
)
def test_when_to_use_colours(
    colour: str, environ: dict[str, str], terminal: bool, expected: bool
) -> None:
    stream = Terminal() if terminal else io.StringIO()
    assert style_for(stream, colour, environ).colour is expected


def fake_machine(root: Path, release: str, cmdline: str = "") -> dict[str, CheckStatus]:
    (root / "sys" / "kernel").mkdir(parents=True)
    (root / "sys" / "kernel" / "osrelease").write_text(release + "\n")
    (root / "cmdline").write_text(cmdline + "\n")
    checks = check_machine(root, root / "sys", root / "sysfs")
    return {check.name: check.status for check in checks}


def test_old_kernel_fails(tmp_path: Path) -> None:
    assert fake_machine(tmp_path, "4.19.0-27-amd64")["kernel"] is CheckStatus.FAIL


@pytest.mark.parametrize("release", ["5.4.0", "6.1.0-28-amd64", "6.18.44-fc-v595", "10.0"])
def test_new_kernel_is_fine(tmp_path: Path, release: str) -> None:
    assert fake_machine(tmp_path, release)["kernel"] is CheckStatus.OK


def test_kernel_with_a_strange_name_is_a_warning(tmp_path: Path) -> None:
    assert fake_machine(tmp_path, "mine")["kernel"] is CheckStatus.WARN


def test_restricted_writes_are_a_warning(tmp_path: Path) -> None:
    cmdline = "quiet proc_mem.force_override=never"
    assert fake_machine(tmp_path, "6.12.0", cmdline)["proc mem"] is CheckStatus.WARN


def test_this_machine_can_be_checked() -> None:
    names = [check.name for check in check_machine()]
    assert {"cpu", "kernel", "memfd", "priority", "spectre_v2"} <= set(names)


def test_real_time_priority_is_tried_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_pid: int, _policy: int, _param: os.sched_param) -> None:
        raise PermissionError

    before = os.sched_getscheduler(0)
    check_machine()
    assert os.sched_getscheduler(0) == before
    monkeypatch.setattr(os, "sched_setscheduler", refuse)
    priority = next(check for check in check_machine() if check.name == "priority")
    assert priority.status is CheckStatus.WARN
    assert "CAP_SYS_NICE" in (priority.advice or "")
