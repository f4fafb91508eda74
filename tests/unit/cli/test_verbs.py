# SPDX-License-Identifier: Apache-2.0
"""``status``, ``detach``, ``sites``, ``doctor`` and what all verbs have in common."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from optpoline.cli.machine import SHARE_DIR, check_machine
from optpoline.cli.main import main
from optpoline.controller.summary import (
    DeclaredKind,
    DeclaredSummary,
    DetachOutcome,
    DetachResult,
    LeftBehind,
    ModuleSummary,
)
from optpoline.errors import ControllerActive, OptpolineError
from optpoline.process.checks import CheckStatus, Diagnosis
from tests.unit.cli.fakes import FakeApi, FakeListing, make_site

VERBS = (*("run", "attach", "status", "check", "detach", "sites", "key", "static-call", "doctor"),)

LEFT = LeftBehind(
    pid=4711,
    controller_pid=99,
    controller_alive=False,
    arenas=2,
    sites=12,
    baseline=3,
    foreign=0,
    site_addresses=((0x401136, "patched"),),
)
LUA = ModuleSummary(path="/usr/bin/lua", n_sites=1, n_refused=0, n_thunks=3, n_plain=7)


def run_optpoline(*args: str, stdout: int = subprocess.PIPE) -> subprocess.CompletedProcess[str]:
    source = Path(__file__).parents[3] / "src"
    return subprocess.run(
        [sys.executable, "-m", "optpoline.cli", *args],
        env=os.environ | {"PYTHONPATH": str(source)},
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"], api=FakeApi()) == 0
    out = capsys.readouterr().out
    assert f"optpoline {verb}" in out
    assert max(len(line) for line in out.splitlines()) <= 80
    for option in ("--json", "--force", "--quiet", "--verbose", "--color"):
        assert option in out


def test_help_lists_every_verb_in_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--help"], api=FakeApi()) == 0
    out = capsys.readouterr().out
    for verb in VERBS:
        assert f"\n  {verb} " in out
    assert "..." not in out.partition("Commands:")[2]


@pytest.mark.parametrize("args", [[], ["bogus"], ["attach"], ["status", "1", "2"], ["sites", "-z"]])
def test_usage_errors(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args, api=FakeApi()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("optpoline: error: ")


@pytest.mark.parametrize("json_option", [["--json", "-"], ["--json=-"]])
def test_usage_errors_as_json(json_option: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", *json_option, "--bogus"], api=FakeApi()) == 2
    assert json.loads(capsys.readouterr().out)["error"]["kind"] == "usage"


def test_json_option_of_the_child_is_not_ours(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--bogus", "--", "x", "--json", "-"], api=FakeApi()) == 125
    assert capsys.readouterr().out == ""


def test_status_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "4711"], api=FakeApi()) == 0
    assert capsys.readouterr().out == "process 4711: nothing of optpoline is in it\n"
    assert main(["status", "4711", "--json", "-"], api=FakeApi()) == 0
    assert json.loads(capsys.readouterr().out)["left_behind"] is None


def test_status_of_something(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "4711"], api=FakeApi(left=LEFT)) == 0
    out = capsys.readouterr().out
    assert "12 sites promoted by controller 99 (gone)" in out
    assert "0x401136" not in out
    assert main(["status", "-v", "4711"], api=FakeApi(left=LEFT)) == 0
    assert "0x401136 patched" in capsys.readouterr().out
    assert main(["status", "4711", "--json", "-"], api=FakeApi(left=LEFT)) == 0
    left = json.loads(capsys.readouterr().out)["left_behind"]
    assert left["promoted"] == 12
    assert left["controller_alive"] is False
    assert left["sites"] == [{"address": "0x401136", "state": "patched"}]


def test_detach_of_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detach", "4711"], api=FakeApi()) == 0
    assert "nothing to undo" in capsys.readouterr().err


def test_detach(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detach", "4711", "--json", "-"], api=FakeApi(left=LEFT)) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["detach"] == {
        "outcome": "clean",
        "restored": 1,
        "foreign": [],
        "notes": [],
        "children": [],
    }
    assert "restored 1 site; nothing of optpoline is left" in err


def test_detach_waits_for_what_is_left_late(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["detach", "4711"], api=FakeApi(left_late=LEFT)) == 0
    assert "restored 1 site" in capsys.readouterr().err


def test_detach_that_leaves_foreign_bytes_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(left=LEFT)
    api.session.result = DetachResult(
        outcome=DetachOutcome.FOREIGN_BYTES, restored=11, foreign=(0x401136,), notes=()
    )
    assert main(["detach", "4711"], api=api) == 7
    assert "restored 11 sites; 1 site left alone" in capsys.readouterr().err


def test_detach_under_a_living_controller() -> None:
    api = FakeApi(left=LEFT, restore_error=ControllerActive("another one"))
    assert main(["detach", "4711"], api=api) == 7


def test_sites_of_a_process_and_of_files(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(listing=FakeListing(modules=(LUA,), sites=(make_site(),), notes=("a note",)))
    for target in ("4711", "0x1267", "./4711", "/usr/bin/lua"):
        assert main(["sites", target], api=api) == 0
    assert api.found == [4711, 4711, "./4711", "/usr/bin/lua"]
    out, err = capsys.readouterr()
    assert "/usr/bin/lua: 1 site, 3 thunks\n" in out
    assert "Base::run(int)+0x12" in out
    assert "0x401136  call" in out
    assert "1 site in 1 module" in err
    assert "note: a note" in err


def test_sites_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(listing=FakeListing(modules=(LUA,), sites=(make_site(),)))
    assert main(["sites", "4711", "--json", "-"], api=api) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["n_sites"] == 1
    assert document["modules"][0]["n_plain"] == 7
    assert document["sites"][0]["address"] == "0x401136"


def test_declarations_are_listed_without_any_site(capsys: pytest.CaptureFixture[str]) -> None:
    declared = tuple(
        DeclaredSummary(
            module="/usr/bin/codec",
            address=0x401000 + 16 * number,
            offset=0x1000,
            kind=kind,
            name=name,
            type=None,
            function=None,
            file="/src/codec.c",
            line=7,
            size=5,
            begins_on=begins_on,
            problem=problem,
        )
        for number, (kind, name, begins_on, problem) in enumerate(
            [
                (DeclaredKind.KEY, "trace", True, None),
                (DeclaredKind.BRANCH, "trace", False, None),
                (DeclaredKind.DYNAMIC_CALL, None, None, "too short"),
            ]
        )
    )
    api = FakeApi(listing=FakeListing(modules=(), declared=declared))
    assert main(["sites", "./codec"], api=api) == 0
    out, err = capsys.readouterr()
    assert [line.split() for line in out.splitlines()] == [
        ["/usr/bin/codec:", "3", "declared", "in", "its", "source"],
        ["address", "declared", "name", "begins", "source", "changeable"],
        ["0x401000", "key", "trace", "on", "codec.c:7", "yes"],
        ["0x401010", "branch", "trace", "nop", "codec.c:7", "yes"],
        ["0x401020", "dynamic", "call", "-", "-", "codec.c:7", "no:", "too", "short"],
    ]
    assert "0 sites in 0 modules; 3 declarations" in err


def test_no_sites_says_what_there_is_instead(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(listing=FakeListing(modules=(LUA,)))
    assert main(["sites", "4711"], api=api) == 3
    out, err = capsys.readouterr()
    assert out == ""
    assert "process 4711 has no retpoline site: 3 thunks in its modules, 7 plain indirect br" in err


def test_no_sites_in_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    api = FakeApi(listing=FakeListing(modules=(LUA,)))
    assert main(["sites", "./lua"], api=api) == 3
    assert "./lua has no retpoline site: 3 thunks in it, 7 plain" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("n_thunks", "n_inline", "words"),
    [
        (0, 0, "it was not built with retpolines (-mindirect-branch=thunk)"),
        (0, 2, "build with -mindirect-branch=thunk"),
        (3, 0, None),
    ],
)
def test_no_sites_says_what_to_do(
    n_thunks: int, n_inline: int, words: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    module = replace(LUA, n_thunks=n_thunks, n_inline=n_inline)
    api = FakeApi(listing=FakeListing(modules=(module,)))
    assert main(["sites", "--json", "-", "./lua"], api=api) == 3
    out, err = capsys.readouterr()
    hint = json.loads(out)["error"]["hint"]
    assert (hint is None) if words is None else (words in hint and f"  {hint}\n" in err)


def test_sites_of_a_number_no_process_has() -> None:
    assert main(["sites", "0"], api=FakeApi()) == 2


def test_doctor_exits_with_what_an_attach_would(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor", str(1 << 22)], api=FakeApi()) == 4
    out = capsys.readouterr().out
    assert f"process {1 << 22} cannot be attached to" in out
    # Paths are not cut.
    assert max(len(line) for line in out.splitlines() if str(SHARE_DIR) not in line) <= 80
    assert main(["doctor", str(os.getpid()), "--json", "-"], api=FakeApi()) == 6
    document = json.loads(capsys.readouterr().out)
    assert document["attachable"] is False
    assert document["exit_code"] == 6
    assert document["target"][0]["status"] == "fail"


def test_doctor_says_where_the_scripts_are(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"], api=FakeApi()) == 0
    out = capsys.readouterr().out
    for name in ("optpoline-gdb.py", "optpoline-perf.py"):
        path = next(line.strip() for line in out.splitlines() if line.endswith(name))
        assert Path(path).is_file()


def test_doctor_misses_scripts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("optpoline.cli.machine.SHARE_DIR", tmp_path)
    checks = {check.name: check for check in check_machine()}
    assert checks["gdb script"].status is CheckStatus.WARN
    assert checks["perf script"].status is CheckStatus.WARN


@pytest.mark.parametrize(
    ("left", "controller_pid", "exit_code", "words"),
    [
        (None, None, 0, "ok   optpoline  nothing of optpoline is in it"),
        (LEFT, None, 0, "warn optpoline  an earlier controller left 12 promoted sites, 2 arenas"),
        (
            replace(LEFT, controller_alive=True),
            99,
            7,
            "fail optpoline  controller 99 works on it now (12 promoted sites, 2 arenas)",
        ),
        (
            replace(LEFT, controller_alive=True),
            None,
            0,
            "warn optpoline  it has 12 promoted sites, 2 arenas from the process",
        ),
    ],
)
def test_doctor_says_what_of_optpoline_is_in_a_process(
    left: LeftBehind | None,
    controller_pid: int | None,
    exit_code: int,
    words: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("optpoline.cli.doctor.diagnose", lambda pid: Diagnosis(pid=pid, checks=()))
    monkeypatch.setattr("optpoline.cli.doctor.find_controller", lambda pid: controller_pid)
    assert main(["doctor", "4711"], api=FakeApi(left=left)) == exit_code
    out = capsys.readouterr().out
    assert words in out
    assert ("cannot be attached to" in out) == (exit_code != 0)


def test_doctor_leaves_out_what_it_may_not_see(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    class Blind(FakeApi):
        def read_status(self, pid: int) -> LeftBehind | None:
            raise OptpolineError("not for us")

    monkeypatch.setattr("optpoline.cli.doctor.diagnose", lambda pid: Diagnosis(pid=pid, checks=()))
    assert main(["doctor", "4711"], api=Blind()) == 0
    assert "can be attached to" in capsys.readouterr().out


def test_colours(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("NO_COLOR", "FORCE_COLOR", "CLICOLOR_FORCE"):
        monkeypatch.delenv(name, raising=False)
    main(["doctor"], api=FakeApi())
    assert "\x1b" not in capsys.readouterr().out
    main(["doctor", "--color", "always"], api=FakeApi())
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("CLICOLOR_FORCE", "1")
    main(["doctor"], api=FakeApi())
    assert "\x1b[" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    main(["doctor"], api=FakeApi())
    assert "\x1b" not in capsys.readouterr().out


def test_interrupt_outside_of_a_session() -> None:
    class Interrupted(FakeApi):
        def read_status(self, pid: int) -> LeftBehind | None:
            raise KeyboardInterrupt

    assert main(["status", "1"], api=Interrupted()) == 130


INTERRUPTED_AT_IMPORT = """
import os, signal, sys
from optpoline.cli.__main__ import main

# A background job of a script, as tests may be, starts with SIGINT ignored.
handlers = {"heeded": signal.default_int_handler, "ignored": signal.SIG_IGN}
signal.signal(signal.SIGINT, handlers[sys.argv.pop(1)])

class Interrupter:
    name = sys.argv.pop(1)

    def find_spec(self, name, path=None, target=None):
        if name == self.name:
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Interrupter())
sys.exit(main())
"""


@pytest.mark.parametrize(
    "module",
    [
        *("optpoline.cli.main", "click", "optpoline.report.json_document"),
        *("optpoline.cli.sites", "optpoline.controller.summaries", "numpy"),
        *("numpy._core._multiarray_umath", "iced_x86"),
    ],
)
def test_interrupt_while_importing_shows_no_traceback(module: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_IMPORT, "heeded", module, "sites", sys.executable],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "")


def test_ignored_interrupts_stay_ignored() -> None:
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED_AT_IMPORT, "ignored", "click", "--version"],
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[3] / "src")},
        stdout=subprocess.PIPE,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0
    assert done.stdout.startswith("optpoline, version ")


def test_unforeseen_os_error_is_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    class Broken(FakeApi):
        def read_status(self, pid: int) -> LeftBehind | None:
            raise OSError(24, "Too many open files", "/proc/1/maps")

    assert main(["status", "1"], api=Broken()) == 1
    assert capsys.readouterr().err == "optpoline: error: /proc/1/maps: Too many open files\n"


def test_reader_that_goes_away() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = run_optpoline("doctor", stdout=writing)
    finally:
        os.close(writing)
    assert done.returncode == 141
    assert done.stderr == ""


def test_help_imports_no_engine() -> None:
    code = (
        "import sys, types; package = types.ModuleType('optpoline');"
        "package.__path__ = [sys.argv[1]]; sys.modules['optpoline'] = package;"
        "from optpoline.cli.main import main; main(['--help']);"
        "heavy = {'numpy', 'iced_x86', 'elftools', 'cpp_demangle', 'rich'} & set(sys.modules);"
        "sys.exit(repr(heavy) if heavy else 0)"
    )
    source = Path(__file__).parents[3] / "src" / "optpoline"
    done = subprocess.run(
        [sys.executable, "-c", code, str(source)],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 0, done.stderr
