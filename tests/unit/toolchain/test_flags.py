# SPDX-License-Identifier: Apache-2.0
"""``cflags``, ``ldflags`` and ``plugin build``: what they print, and their errors."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path

import pytest

from optpoline.cli.main import main
from optpoline.errors import UsageError
from optpoline.toolchain.compiler import Compiler, Family
from optpoline.toolchain.flags import Form, Mode, compile_flags, link_flags
from tests.unit.toolchain.conftest import ROOT, FakeCompiler

GCC = Compiler(command=("gcc",), family=Family.GCC, version="12.2.0")
CLANG = Compiler(command=("clang",), family=Family.CLANG, version="14.0.6")
PLUGIN = Path("/a b/optpoline.so")
VERBS = (("cflags",), ("ldflags",), ("plugin", "build"))


@pytest.mark.parametrize("compiler", [GCC, CLANG])
@pytest.mark.parametrize("form", Form)
def test_retpolines_go_without_enforcement(compiler: Compiler, form: Form) -> None:
    flags = compile_flags(compiler, form, plugin=PLUGIN)
    assert ("-fcf-protection=none" in flags) is form.has_thunks
    assert any("thunk" in flag for flag in flags) is form.has_thunks
    assert any(flag.startswith("-fplugin=") for flag in flags) is form.has_plugin
    assert any(flag.endswith(".S") for flag in link_flags(form, plugin=PLUGIN)) is form.has_thunks


def test_mode_is_told_only_where_it_is_not_the_default() -> None:
    assert not [one for one in compile_flags(GCC, Form.MARKED, plugin=PLUGIN) if "mode" in one]
    for flags in (
        compile_flags(GCC, Form.MARKED, plugin=PLUGIN, mode=Mode.OPT_IN),
        link_flags(Form.MARKED, plugin=PLUGIN, mode=Mode.OPT_IN),
    ):
        assert "-fplugin-arg-optpoline-mode=opt-in" in flags


def test_no_plugin_no_flags() -> None:
    with pytest.raises(UsageError, match="needs a plugin"):
        compile_flags(GCC, Form.MARKED)


def test_printed_for_a_shell(
    fake_compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cflags", "--cc", str(fake_compiler())]) == 0
    printed = shlex.split(capsys.readouterr().out)
    assert printed[0].startswith("-I")
    assert printed[1:] == [
        *("-mindirect-branch=thunk-extern", "-mindirect-branch-register", "-fcf-protection=none")
    ]


@pytest.mark.parametrize("verb", [("plugin", "build"), ("cflags", "--plugin")])
@pytest.mark.parametrize(
    ("version", "family", "said"),
    [
        ("11.4.0", "gcc", "the plugin is for GCC 12 to 14, and this is"),
        ("14.0.6", "clang", "the plugin is for GCC, and this is"),
        ("12.2.0", "gcc", "install the Debian package gcc-12-plugin-dev"),
    ],
)
def test_a_plugin_that_cannot_be_built(
    fake_compiler: FakeCompiler,
    capsys: pytest.CaptureFixture[str],
    verb: tuple[str, ...],
    version: str,
    family: str,
    said: str,
) -> None:
    compiler = fake_compiler(version=version, family=family, plugin_dir="plugin")
    assert main([*verb, "--cc", str(compiler)]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert said in err
    assert str(compiler) in err


def test_compiler_from_the_environment(
    fake_compiler: FakeCompiler,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("CC", str(fake_compiler("cc", version="16.0.1", family="clang")))
    assert main(["cflags", "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["schema_version"], document["command"]) == (1, "cflags")
    assert document["compiler"]["family"] == "Clang"
    assert document["compiler"]["version"] == "16.0.1"
    assert "-mretpoline-external-thunk" in document["flags"]


def test_thunks_to_link_are_there(
    fake_compiler: FakeCompiler, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["ldflags", "--cc", str(fake_compiler())]) == 0
    (thunks,) = shlex.split(capsys.readouterr().out)
    assert Path(thunks).is_file()


def test_costs_of_each_form(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cflags", "--explain", "--cc", "no-such-compiler"]) == 0
    out = capsys.readouterr().out
    assert all(f"{form.value}: " in out for form in Form)


def test_costs_are_no_document(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "flags.json"
    assert main(["cflags", "--explain", "--json", str(path)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert "leave out --json to read the costs, or --explain" in err
    assert json.loads(path.read_text())["error"]["kind"] == "usage"


@pytest.mark.parametrize("verb", VERBS)
def test_errors_are_one_sentence(
    verb: tuple[str, ...], capsys: pytest.CaptureFixture[str], fake_compiler: FakeCompiler
) -> None:
    assert main([*verb, "--cc", "no-such-compiler"]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines()[0] == "optpoline: error: there is no compiler no-such-compiler"
    options = [] if verb[0] == "plugin" else ["--plugin"]
    assert main([*verb, *options, "--cc", str(fake_compiler())]) == 1
    out, err = capsys.readouterr()
    assert out == ""
    assert "  install the Debian package gcc-12-plugin-dev" in err.splitlines()


def test_mode_without_plugin(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cflags", "--mode", "opt-in"]) == 2
    assert "--mode is the plugin's" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_help(verb: tuple[str, ...], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert f"optpoline {' '.join(verb)}" in out
    assert "--cc" in out
    assert "--json" in out


def test_printed_flags_work(
    plugin: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(ROOT / "build" / "cache"))
    monkeypatch.delenv("CC", raising=False)
    assert main(["plugin", "build"]) == 0
    assert capsys.readouterr().out == f"{plugin}\n"
    assert main(["cflags", "--plugin", "--retpoline"]) == 0
    compiling = shlex.split(capsys.readouterr().out)
    assert main(["ldflags", "--plugin", "--retpoline"]) == 0
    linking = shlex.split(capsys.readouterr().out)
    source, program = ROOT / "tests" / "targets" / "marked.c", tmp_path / "marked"
    argv = ["gcc", "-O2", *compiling, str(source), "-o", str(program), *linking]
    subprocess.run(argv, check=True, timeout=60)
    subprocess.run([program], check=True, timeout=10)
