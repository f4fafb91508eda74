# SPDX-License-Identifier: Apache-2.0
"""Building the plugin: what is missing is named, what is there is not built again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from optpoline.cli.main import main
from optpoline.errors import ToolchainError
from optpoline.toolchain.compiler import Compiler, find_compiler
from optpoline.toolchain.gcc_plugin import build_plugin, plugin_path
from tests.unit.toolchain.conftest import FakeCompiler


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the user's cache out of it."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def headers(tmp_path: Path) -> Path:
    """Return a plugin directory with what is looked for in it."""
    include = tmp_path / "plugin" / "include"
    include.mkdir(parents=True)
    (include / "gcc-plugin.h").write_text("")
    (include / "plugin-version.h").write_text("12.2.0")
    return include.parent


@pytest.fixture
def compiler(fake_compiler: FakeCompiler, headers: Path) -> Compiler:
    """Return a compiler whose C++ compiler writes "built"."""
    fake_compiler("g++", otherwise='while [ "$1" != -o ]; do shift; done; echo built >"$2"')
    return find_compiler(str(fake_compiler(plugin_dir=headers)))


@pytest.mark.parametrize(
    ("version", "family", "said"),
    [
        ("11.4.0", "gcc", r"the plugin is for GCC 12 to 14, and this is .*gcc \(GCC 11.4.0\)"),
        ("15.1.0", "gcc", r"the plugin is for GCC 12 to 14, and this is .*gcc \(GCC 15.1.0\)"),
        ("14.0.6", "clang", r"the plugin is for GCC, and this is .*gcc \(Clang 14.0.6\)"),
    ],
)
def test_wrong_compiler(fake_compiler: FakeCompiler, version: str, family: str, said: str) -> None:
    with pytest.raises(ToolchainError, match=said):
        build_plugin(find_compiler(str(fake_compiler(version=version, family=family))))


@pytest.mark.parametrize("answer", ["plugin", "/nowhere/plugin"])
def test_headers_are_missing(fake_compiler: FakeCompiler, answer: str) -> None:
    compiler = find_compiler(str(fake_compiler(version="13.2.0", plugin_dir=answer)))
    with pytest.raises(ToolchainError, match=r"plugin headers of .*13.2.0\) are not") as caught:
        build_plugin(compiler)
    assert caught.value.hint == "install the Debian package gcc-13-plugin-dev"


def test_no_cxx_compiler(fake_compiler: FakeCompiler, headers: Path) -> None:
    compiler = find_compiler(str(fake_compiler(plugin_dir=headers)))
    with pytest.raises(ToolchainError, match=r"there is no compiler .*g\+\+") as caught:
        build_plugin(compiler)
    assert caught.value.hint == "install the Debian package g++-12"


def test_source_that_does_not_compile(
    fake_compiler: FakeCompiler, headers: Path, cache: Path
) -> None:
    fake_compiler("g++")
    compiler = find_compiler(str(fake_compiler(plugin_dir=headers)))
    with pytest.raises(
        ToolchainError, match=r"cannot be built with .*g\+\+: a.cc:1:2: error: no;"
    ) as caught:
        build_plugin(compiler)
    assert "g++-12 and gcc-12-plugin-dev" in (caught.value.hint or "")
    assert not [path for path in cache.rglob("*") if path.is_file()]


def test_built_once(compiler: Compiler, cache: Path) -> None:
    path = build_plugin(compiler)
    assert path.read_text() == "built\n"
    assert path.is_relative_to(cache)
    assert path == plugin_path(compiler)
    assert path.name == "optpoline.so"
    assert os.access(path, os.X_OK)
    path.write_text("kept")
    assert build_plugin(compiler).read_text() == "kept"
    assert build_plugin(compiler, again=True).read_text() == "built\n"
    assert [one.name for one in path.parent.iterdir()] == ["optpoline.so"]


def test_another_build_of_the_compiler_is_another_plugin(compiler: Compiler, headers: Path) -> None:
    before = plugin_path(compiler)
    (headers / "include" / "plugin-version.h").write_text("12.2.0, configured otherwise")
    assert plugin_path(compiler) != before


def test_a_place_of_ones_own(compiler: Compiler, tmp_path: Path, cache: Path) -> None:
    path = tmp_path / "new" / "mine.so"
    assert build_plugin(compiler, output=path) == path
    assert path.read_text() == "built\n"
    assert not cache.exists()


def test_what_is_in_the_place_is_kept(
    compiler: Compiler, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.so"
    path.write_text("precious")
    verb = ("plugin", "build", "--cc", *compiler.command, "--output", str(path))
    assert main(list(verb)) == 2
    assert path.read_text() == "precious"
    assert "use --force to overwrite it" in capsys.readouterr().err
    assert main([*verb, "--force"]) == 0
    assert path.read_text() == "built\n"
    assert capsys.readouterr().out == f"{path}\n"


@pytest.mark.parametrize(
    ("name", "said"), [("-", "stdout takes no file of --output"), (".", "is no regular file")]
)
def test_no_place_for_a_file(name: str, said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plugin", "build", "--force", "--output", name]) == 2
    assert said in capsys.readouterr().err


def test_a_place_that_cannot_be(compiler: Compiler, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ToolchainError, match=r"file/mine.so cannot be written"):
        build_plugin(compiler, output=tmp_path / "file" / "mine.so")


def test_relative_cache_is_ignored(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert plugin_path(compiler).is_relative_to(tmp_path / "home" / ".cache")
