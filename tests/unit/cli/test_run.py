# SPDX-License-Identifier: Apache-2.0
"""``run``: the child's life is its own."""

from __future__ import annotations

import io
import json
import os
import signal
import sys
import threading
from pathlib import Path

import pytest

from optpoline.cli.api import OnEvent, SessionSettings
from optpoline.cli.child import Child
from optpoline.cli.main import main
from optpoline.controller.summary import DetachOutcome, DetachResult, SessionState
from optpoline.errors import (
    NoSites,
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    SiteChanged,
)
from tests.unit.cli.fakes import FakeApi, FakeSession


@pytest.fixture
def fifo(tmp_path: Path) -> Path:
    """A pipe with a name: both ends wait for each other."""
    path = tmp_path / "fifo"
    os.mkfifo(path)
    return path


def watch_until_stopped(stop: threading.Event) -> SessionState:
    assert stop.wait(60)
    return SessionState.EXITED


def sleeping_api() -> FakeApi:
    return FakeApi(session=FakeSession(on_watch=watch_until_stopped))


@pytest.mark.parametrize(
    ("script", "status"),
    [("exit 0", 0), ("exit 7", 7), ("exit 125", 125), ("kill -TERM $$", 143), ("kill -9 $$", 137)],
)
def test_status_is_passed_on(script: str, status: int) -> None:
    assert main(["run", "-q", "--", "sh", "-c", script], api=sleeping_api()) == status


def test_options_of_the_command_are_its_own(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "-q", "printf", "%s|", "--json", "-", "--leave"], api=FakeApi()) == 0
    assert capfd.readouterr().out == "--json|-|--leave|"


def test_no_such_program(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi()
    assert main(["run", "--json", "-", "--", "/no/such/program"], api=api) == 127
    out, err = capsys.readouterr()
    assert err == "optpoline: error: /no/such/program: no such program\n"
    error = json.loads(out)["error"]
    assert (error["kind"], error["exit_code"]) == ("not_found", 127)
    assert api.attached == []


def test_not_executable(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = tmp_path / "plain"
    plain.write_text("not a program")
    assert main(["run", "--", str(plain)], api=FakeApi()) == 126
    plain.chmod(0o755)
    assert main(["run", "--", str(plain)], api=FakeApi()) == 126
    assert main(["run", "--", str(tmp_path)], api=FakeApi()) == 126
    assert "cannot be executed" in capsys.readouterr().err
    assert main(["run", "--json", "-", "--", str(plain)], api=FakeApi()) == 126
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["exit_code"]) == ("not_executable", 126)


@pytest.mark.parametrize("args", [[], ["--bogus", "true"], ["--duration", "x", "true"]])
def test_own_failures(args: list[str]) -> None:
    assert main(["run", *args], api=FakeApi()) == 125


def test_kind_of_an_own_failure(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--json", "-", "--policy", "none", "--", "true"], api=FakeApi()) == 125
    error = json.loads(capsys.readouterr().out)["error"]
    assert (error["kind"], error["exit_code"]) == ("usage", 125)


def test_existing_json_file_starts_nothing(tmp_path: Path) -> None:
    report, trace = tmp_path / "out.json", tmp_path / "trace"
    report.write_text("precious")
    args = ["run", "--json", str(report), "--", "touch", str(trace)]
    assert main(args, api=FakeApi()) == 125
    assert not trace.exists()


def test_session_lasts_as_long_as_the_child(fifo: Path, tmp_path: Path) -> None:
    class Releasing(FakeSession):
        def promote(self) -> None:
            super().promote()
            fifo.write_text("go\n")

    report = tmp_path / "out.json"
    api = FakeApi(session=Releasing(on_watch=watch_until_stopped))
    api.session.errors["detach"] = ProcessGone(1)
    command = ["timeout", "60", "sh", "-c", f"read line < {fifo}; exit 3"]
    assert main(["run", "-q", "--json", str(report), "--", *command], api=api) == 3
    assert api.session.calls == ["learn", "promote", "watch", "detach"]
    document = json.loads(report.read_text())
    assert document["command"] == "run"
    assert document["state"] == "exited"
    assert document["exit_status"] == 3
    assert document["promoted"] == 1


def test_summary_is_told_when_the_session_ends(fifo: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class ReleasingTheProgram(io.StringIO):
        def write(self, text: str) -> int:
            if "left: the promotions keep working" in text:
                fifo.write_text("go\n")
            return super().write(text)

    monkeypatch.setattr(sys, "stderr", ReleasingTheProgram())
    api = FakeApi(session=FakeSession(on_watch=lambda stop: SessionState.WATCHING))
    command = ["timeout", "20", "sh", "-c", f"read line < {fifo}; exit 6"]
    assert main(["run", "--leave", "--duration", "1", "--", *command], api=api) == 6
    assert api.session.calls[-1] == "leave"


def test_program_that_ends_too_soon_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(attach_errors=[ProcessGone(1)] * 1000)
    assert main(["run", "--json", "-", "--", "true"], api=api) == 0
    out, err = capsys.readouterr()
    assert err == "not promoted: the program ended before it could be attached to\n"
    assert json.loads(out)["notes"] == ["the program ended before it could be attached to"]


def test_what_a_launcher_starts_is_not_followed(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(attach_errors=[NoSites("process 7 (sh) has no site", hint="build it so")])
    command = ["sh", "-c", "sleep 0.2"]
    assert main(["run", "--json", "-", "--", *command], api=api) == 0
    out, err = capsys.readouterr()
    assert err.splitlines()[0] == "not promoted: process 7 (sh) has no site"
    assert err.splitlines()[1] == "  build it so"
    assert "put `optpoline run --` before that" in err.splitlines()[2]
    (note,) = json.loads(out)["notes"]
    assert note.startswith("process 7 (sh) has no site; build it so; ")
    assert "`optpoline run --`" in note


def test_program_that_is_executed_later_is_found(
    fifo: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    class FirstWithout(FakeApi):
        def attach(self, pid: int, *, settings: SessionSettings, on_event: OnEvent) -> FakeSession:
            session = super().attach(pid, settings=settings, on_event=on_event)
            if len(self.attached) == 1:
                fifo.write_text("go\n")
                raise NoSites("the shell has no retpoline site")
            fifo.write_text("second\n")
            return session

    api = FirstWithout(session=FakeSession(on_watch=watch_until_stopped))
    command = ["sh", "-c", f"read line < {fifo}; exec timeout 60 cat {fifo}"]
    assert main(["run", "--", *command], api=api) == 0
    out, err = capfd.readouterr()
    assert out == "second\n"
    assert err.count("not promoted: the shell has no retpoline site") == 1
    assert len(set(api.attached)) == 1
    assert len(api.attached) >= 2


def test_new_session_after_an_exec(fifo: Path, tmp_path: Path) -> None:
    def exec_then_exit(stop: threading.Event) -> SessionState:
        fifo.write_text("go\n")
        if len(api.attached) == 1:
            return SessionState.EXECED
        return watch_until_stopped(stop)

    report = tmp_path / "out.json"
    api = FakeApi(session=FakeSession(on_watch=exec_then_exit))
    api.session.result = DetachResult(outcome=DetachOutcome.GONE, restored=0, foreign=(), notes=())
    api.session.after_state = SessionState.EXECED
    command = ["sh", "-c", f"read line < {fifo}; exec timeout 60 cat {fifo}"]
    assert main(["run", "-q", "--json", str(report), "--", *command], api=api) == 0
    assert len(api.attached) >= 2
    assert "replaced itself" in json.loads(report.read_text())["notes"][0]


def test_program_that_cannot_be_attached_runs_on(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(attach_errors=[PermissionDenied("ptrace_scope is 2", hint="sysctl")])
    command = ["sh", "-c", "sleep 0.2; exit 5"]
    assert main(["run", "--", *command], api=api) == 5
    err = capsys.readouterr().err
    assert "the program runs on unpromoted: ptrace_scope is 2" in err


def test_failing_session_leaves_the_program_running(
    fifo: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    class Failing(FakeSession):
        def promote(self) -> None:
            fifo.write_text("go\n")
            raise SiteChanged(0x10, b"a", b"b")

    api = FakeApi(session=Failing())
    command = ["timeout", "60", "sh", "-c", f"read line < {fifo}; exit 4"]
    assert main(["run", "--", *command], api=api) == 4
    assert api.session.calls == ["learn", "detach"]
    assert "the program runs on unpromoted" in capsys.readouterr().err


def test_interrupts_are_left_to_the_child_and_term_is_passed_on(fifo: Path) -> None:
    code = f"""
import signal, sys
signal.signal(signal.SIGTERM, lambda *_: sys.exit(9))
signal.signal(signal.SIGALRM, signal.SIG_DFL)
signal.alarm(60)
open({str(fifo)!r}, "w").close()
while True:
    signal.pause()
"""

    def send_both(stop: threading.Event) -> SessionState:
        fifo.read_text()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        return watch_until_stopped(stop)

    before = signal.getsignal(signal.SIGINT)
    api = FakeApi(session=FakeSession(on_watch=send_both))
    assert main(["run", "-q", "--", sys.executable, "-c", code], api=api) == 9
    assert signal.getsignal(signal.SIGINT) == before


def test_signals_have_their_defaults_in_the_child(capfd: pytest.CaptureFixture[str]) -> None:
    assert (
        main(["run", "-q", "grep", "-E", "^Sig(Ign|Cgt)", "/proc/self/status"], api=FakeApi()) == 0
    )
    masks = dict(line.split(":\t") for line in capfd.readouterr().out.splitlines())
    pipe = 1 << (signal.SIGPIPE - 1)
    interrupt = 1 << (signal.SIGINT - 1)
    assert int(masks["SigIgn"], 16) & (pipe | interrupt) == 0
    assert int(masks["SigCgt"], 16) & interrupt == 0


def test_descriptors_are_passed_on(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w") as out:
        os.set_inheritable(out.fileno(), True)
        code = f"import os; os.write({out.fileno()}, b'here')"
        assert main(["run", "-q", "--", sys.executable, "-c", code], api=FakeApi()) == 0
    assert (tmp_path / "out").read_text() == "here"


def test_lost_status_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    child = Child(["true"])
    child.start(lambda: None)
    assert child.exited.wait(30)
    os.waitpid(child.pid, 0)
    with pytest.raises(OptpolineError, match="exit status"):
        child.wait_status()
