# SPDX-License-Identifier: Apache-2.0
"""``attach``: what it does to a session, says, writes and exits with."""

from __future__ import annotations

import io
import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path

import pytest

from optpoline.cli.api import SessionSettings
from optpoline.cli.console import Console
from optpoline.cli.drive import SessionPlan, drive_session
from optpoline.cli.main import main
from optpoline.controller.summary import DetachOutcome, DetachResult, SessionState
from optpoline.controller.tracing import RecordPlan, RecordTotals
from optpoline.errors import (
    ControllerActive,
    NoSites,
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    SiteChanged,
    UnsupportedTarget,
)
from optpoline.report.table import Style
from optpoline.simulate.trace_file import TraceWriter
from tests.unit.cli.fakes import FakeApi, FakeEvent, FakeKind, FakeSession, make_summary

NOT_ALL = DetachResult(
    outcome=DetachOutcome.INCOMPLETE, restored=0, foreign=(), notes=("gdb is in the way",)
)

PROMOTED_LINE = "promoted 1 of 2 sites in 0.012 s"


def api_ending_with(state: SessionState) -> FakeApi:
    return FakeApi(session=FakeSession(on_watch=lambda stop: state))


def test_learns_promotes_watches_and_restores(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    assert main(["attach", "4711"], api=api) == 0
    assert api.attached == [4711]
    assert api.session.calls == ["learn", "promote", "watch", "detach"]
    out, err = capsys.readouterr()
    assert out == ""
    lines = err.splitlines()
    assert lines[0] == "attached: 2 sites in 1 module"
    assert lines[1] == PROMOTED_LINE
    assert "relearned one site" not in err
    assert "restored: every byte is as it was before" in err
    assert "1 of 2 sites promoted, hit rate 99.3%" in err


def test_hex_pid() -> None:
    api = FakeApi()
    assert main(["attach", "0x1267", "-q"], api=api) == 0
    assert api.attached == [4711]


@pytest.mark.parametrize("pid", ["-1", "0", "x", "0x", "99999999999", "4711.0", "", "٣"])
def test_bad_pid_is_a_usage_error(pid: str, capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    assert main(["attach", "--", pid], api=api) == 2
    assert api.attached == []
    assert capsys.readouterr().err.startswith("optpoline: error: ")


@pytest.mark.parametrize("seconds", ["-1", "nan", "inf", "soon"])
def test_bad_duration_is_a_usage_error(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "1", f"--duration={seconds}"], api=FakeApi()) == 2
    assert f"'{seconds}' is not a number of seconds" in capsys.readouterr().err


@pytest.mark.parametrize("time", ["abc", "inf", "-1", "0", "0.0"])
@pytest.mark.parametrize(
    ("option", "unit"), [("--max-stop-ms", "milliseconds"), ("--learn-seconds", "seconds")]
)
def test_lengths_are_above_zero_and_told_in_their_unit(
    option: str, unit: str, time: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi()
    assert main(["attach", "1", f"{option}={time}"], api=api) == 2
    assert api.attached == []
    err = capsys.readouterr().err
    assert f"'{option}'" in err
    assert f"'{time}' is not a number of {unit}{' above 0' if time in ('0', '0.0') else ''}" in err


def test_too_short_a_duration_promotes_nothing_and_restores() -> None:
    api = FakeApi()
    assert main(["attach", "1", "--duration", "0"], api=api) == 0
    assert api.session.calls == ["detach"]


def test_too_short_a_duration_still_promotes_what_is_to_be_left() -> None:
    api = FakeApi()
    assert main(["attach", "1", "--duration", "0", "--leave"], api=api) == 0
    assert api.session.calls == ["learn", "promote", "leave"]


def test_learning_never_exceeds_the_duration() -> None:
    api = api_ending_with(SessionState.EXITED)
    assert main(["attach", "1", "--duration", "9", "--learn-seconds", "99"], api=api) == 0
    assert api.session.calls[0] == "learn 9"


def test_nothing_promoted_is_not_called_promoted(capsys: pytest.CaptureFixture[str]) -> None:
    class Cold(FakeSession):
        def promote(self) -> None:
            self.calls.append("promote")
            self.on_event(FakeEvent(FakeKind.NOT_PROMOTED, "nothing to promote yet: it sleeps"))

    assert main(["attach", "1"], api=FakeApi(session=Cold())) == 0
    lines = capsys.readouterr().err.splitlines()
    assert lines[1] == "nothing to promote yet: it sleeps"
    assert not [line for line in lines if line.startswith("promoted ")]


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "1", "-q"], api=FakeApi()) == 0
    assert capsys.readouterr() == ("", "")


def test_verbose_says_more(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "1", "-v"], api=FakeApi()) == 0
    assert "relearned one site" in capsys.readouterr().err


def test_target_that_exits_is_orderly(capsys: pytest.CaptureFixture[str]) -> None:
    api = api_ending_with(SessionState.EXITED)
    api.session.errors["detach"] = ProcessGone(1)
    assert main(["attach", "1", "--duration", "60", "--json", "-"], api=api) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == "exited"
    assert document["promoted"] == 1
    assert document["detach"]["outcome"] == "gone"


@pytest.mark.parametrize("step", ["learn", "promote", "watch"])
def test_target_that_is_gone_in_any_step_is_orderly(step: str) -> None:
    api = FakeApi()
    api.session.errors[step] = ProcessGone(1)
    assert main(["attach", "1"], api=api) == 0
    assert api.session.calls[-1] == "detach"


@pytest.mark.parametrize("step", ["learn", "promote", "watch"])
def test_error_in_any_step_restores_first(step: str, capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    api.session.errors[step] = SiteChanged(0x10, b"\xe8", b"\xcc")
    assert main(["attach", "1", "--leave"], api=api) == 7
    assert api.session.calls[-1] == "detach"
    assert "bytes at 0x10 are cc, not e8" in capsys.readouterr().err


@pytest.mark.parametrize("step", ["learn", "promote", "watch"])
def test_error_after_which_not_all_is_restored_ends_with_a_summary(
    step: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi()
    api.session.errors[step] = PermissionDenied("gdb traces it", hint="let it go")
    api.session.result = NOT_ALL
    api.session.after_state = SessionState.PARTLY_RESTORED
    assert main(["attach", "1", "--json", "-"], api=api) == 7
    assert api.session.calls[-1] == "detach"
    assert api.session.calls.count("detach") == 1
    out, err = capsys.readouterr()
    document = json.loads(out)
    assert document["state"] == "partly_restored"
    assert document["detach"]["outcome"] == "incomplete"
    assert "gdb traces it" in document["notes"]
    assert "optpoline: error: gdb traces it\n  let it go\n" in err
    assert "not all restored" in err


@pytest.mark.parametrize("verb", ["attach", "record"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_what_is_left_counts_more_than_the_signal(
    number: signal.Signals, verb: str, tmp_path: Path
) -> None:
    class Signalled(FakeSession):
        def record(
            self, writer: TraceWriter, plan: RecordPlan, stop: threading.Event
        ) -> RecordTotals:
            send_and_wait(stop)
            return super().record(writer, plan, stop)

    def send_and_wait(stop: threading.Event) -> SessionState:
        os.kill(os.getpid(), number)
        assert stop.wait(30)
        return SessionState.WATCHING

    inherited = signal.signal(number, signal.default_int_handler)
    try:
        api = FakeApi(session=Signalled(on_watch=send_and_wait, result=NOT_ALL))
        options = ["--trace", str(tmp_path / "trace")] if verb == "record" else []
        assert main([verb, "1", "-q", *options], api=api) == 7
    finally:
        signal.signal(number, inherited)


def test_too_short_a_duration_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "1", "--duration", "0", "--json", "-"], api=FakeApi()) == 0
    out, err = capsys.readouterr()
    (note,) = json.loads(out)["notes"]
    assert note.startswith("nothing was promoted: the duration of 0 s was over with the first")
    assert "takes 1 s (--learn-seconds)" in note
    assert f"note: {note}" in err


def test_a_duration_that_is_long_enough_has_no_note(capsys: pytest.CaptureFixture[str]) -> None:
    api = api_ending_with(SessionState.EXITED)
    assert main(["attach", "1", "--duration", "9", "--json", "-"], api=api) == 0
    assert json.loads(capsys.readouterr().out)["notes"] == []


def test_a_note_is_told_once(capsys: pytest.CaptureFixture[str]) -> None:
    class Noting(FakeSession):
        def learn(
            self, *, seconds: float | None, stop: threading.Event, in_turn: bool = False
        ) -> None:
            self.on_event(FakeEvent(FakeKind.NOTE, "the arena is used up"))

    session = Noting(before=replace(make_summary(), notes=("the arena is used up", "and so on")))
    assert main(["attach", "1", "--json", "-"], api=FakeApi(session=session)) == 0
    out, err = capsys.readouterr()
    assert err.count("note: the arena is used up\n") == 1
    assert err.count("note: and so on\n") == 1
    assert json.loads(out)["notes"] == ["the arena is used up", "and so on"]


def test_a_pid_that_no_kernel_gives(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "99999999"], api=FakeApi()) == 2
    err = capsys.readouterr().err
    assert "'99999999' is above the largest process id, 4194304" in err
    assert main(["sites", "99999999"], api=FakeApi()) == 2
    assert "above the largest process id" in capsys.readouterr().err


def test_failing_rollback_does_not_hide_the_error(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    api.session.errors = {"promote": ControllerActive("first"), "detach": OptpolineError("second")}
    assert main(["attach", "1"], api=api) == 7
    err = capsys.readouterr().err
    assert "first" in err
    assert "restoring failed: second" in err


@pytest.mark.parametrize(
    ("error", "exit_code", "kind"),
    [
        (OptpolineError("a"), 1, "other"),
        (NoSites("a"), 3, "no_sites"),
        (ProcessGone(1, "a"), 4, "target_gone"),
        (PermissionDenied("a", hint="b"), 5, "permission"),
        (UnsupportedTarget("a"), 6, "unsupported"),
        (ControllerActive("a"), 7, "refused"),
    ],
)
def test_errors_at_attach(
    error: OptpolineError, exit_code: int, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = FakeApi(attach_errors=[error])
    assert main(["attach", "1", "--json", "-"], api=api) == exit_code
    out, err = capsys.readouterr()
    assert json.loads(out) == {
        "schema_version": 1,
        "error": {"kind": kind, "exit_code": exit_code, "message": "a", "hint": error.hint},
    }
    assert "optpoline: error: a" in err
    assert "Traceback" not in err


@pytest.mark.parametrize(
    ("number", "exit_code"), [(signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)]
)
def test_signals_end_it_in_order(number: signal.Signals, exit_code: int) -> None:
    def send_and_wait(stop: threading.Event) -> SessionState:
        os.kill(os.getpid(), number)
        assert stop.wait(30)
        return SessionState.WATCHING

    # Under nohup SIGHUP is ignored, and stays so; this is about a signal that is not.
    inherited = signal.signal(number, signal.default_int_handler)
    try:
        api = FakeApi(session=FakeSession(on_watch=send_and_wait))
        assert main(["attach", "1", "-q"], api=api) == exit_code
        assert api.session.calls[-1] == "detach"
        assert signal.getsignal(number) is signal.default_int_handler
    finally:
        signal.signal(number, inherited)


def test_stop_while_learning_promotes_nothing() -> None:
    stop = threading.Event()

    class Interrupted(FakeSession):
        def learn(
            self, *, seconds: float | None, stop: threading.Event, in_turn: bool = False
        ) -> None:
            super().learn(seconds=seconds, stop=stop)
            stop.set()

    session = Interrupted()
    plan = SessionPlan(settings=SessionSettings(), duration_s=None, leave=False)
    console = Console(io.StringIO(), Style())
    end = drive_session(session, plan, stop, console)
    assert session.calls == ["learn", "detach"]
    assert end.summary.state is SessionState.RESTORED


def test_json_document(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert main(["attach", "1", "-q", "--json", str(path)], api=FakeApi()) == 0
    document = json.loads(path.read_text())
    assert next(iter(document)) == "schema_version"
    assert document["schema_version"] == 1
    assert document["state"] == "restored"
    assert document["n_sites"] == 2
    assert document["promoted"] == 1
    assert document["hit_rate"] == 0.9934
    assert document["stops"] == 4
    assert document["sites"][0] == {
        "module": "/usr/bin/lua",
        "address": "0x401136",
        "offset": "0x1136",
        "function": "_ZN4Base3runEi+0x12",
        "kind": "call",
        "operand": "rax",
        "thunk": "__x86_indirect_thunk_rax",
        "state": "promoted",
        "refusal": None,
        "hit_rate": 0.9934,
        "rate_hz": 1.25e6,
        "targets": [
            {"address": "0x401200", "function": "luaV_execute", "share": 0.75, "promoted": True},
            {"address": "0x401300", "function": None, "share": 0.25, "promoted": False},
        ],
        "table": None,
        "max_branches": 0,
        "branches_from": None,
    }
    assert list(tmp_path.iterdir()) == [path]


def test_left_promotions_are_reported_as_left(capsys: pytest.CaptureFixture[str]) -> None:
    api = api_ending_with(SessionState.WATCHING)
    assert main(["attach", "1", "--leave", "--json", "-"], api=api) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["state"] == "left"
    assert document["detach"]["outcome"] == "left"


def test_existing_json_file_is_kept_and_nothing_is_touched(tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    path.write_text("precious")
    api = FakeApi()
    assert main(["attach", "1", "--json", str(path)], api=api) == 2
    assert api.attached == []
    assert path.read_text() == "precious"
    assert main(["attach", "1", "-f", "-q", "--json", str(path)], api=api) == 0
    assert json.loads(path.read_text())["schema_version"] == 1


def test_json_into_a_missing_directory_is_found_before_the_attach(tmp_path: Path) -> None:
    api = FakeApi()
    assert main(["attach", "1", "--json", str(tmp_path / "no" / "out.json")], api=api) == 1
    assert api.attached == []


def test_json_into_a_device(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["attach", "1", "-q", "--json", "/dev/null"], api=FakeApi()) == 0


def test_foreign_bytes_at_the_end_are_told(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    api.session.result = DetachResult(
        outcome=DetachOutcome.FOREIGN_BYTES,
        restored=0,
        foreign=(0x401136,),
        notes=("0x401136 holds another patcher's bytes",),
    )
    assert main(["attach", "1"], api=api) == 7
    assert "note: 0x401136 holds another patcher's bytes" in capsys.readouterr().err


@pytest.mark.parametrize("fails", [False, True])
def test_progress_line_does_not_outlive_the_session(fails: bool) -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    session = FakeSession(on_watch=lambda stop: SessionState.EXITED)
    if fails:
        session.errors["watch"] = ControllerActive("another one")
    stream = Terminal()
    plan = SessionPlan(settings=SessionSettings(), duration_s=None, leave=False)
    console = Console(stream, Style())
    if fails:
        with pytest.raises(ControllerActive):
            drive_session(session, plan, threading.Event(), console)
    else:
        drive_session(session, plan, threading.Event(), console)
    assert "watching" in stream.getvalue()
    assert stream.getvalue().endswith("\r\x1b[K")
