# SPDX-License-Identifier: Apache-2.0
"""The packages for pkg-config and CMake, as a wheel installs them, build a small project."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from optpoline.cli.main import main
from optpoline.errors import ToolchainError
from optpoline.model import Refusal
from optpoline.toolchain.compiler import Compiler, Family
from optpoline.toolchain.flags import Form, Mode, compile_flags, link_flags
from optpoline.toolchain.packages import pkg_config_path
from tests.unit.toolchain.conftest import ROOT, FakeCompiler

PROJECT = ROOT / "tests" / "targets" / "packaged"
GCC = Compiler(command=("gcc",), family=Family.GCC, version="12.2.0")
CLANG = Compiler(command=("clang",), family=Family.CLANG, version="14.0.6")

DECLARED = Counter(
    {
        ("key", "trace"): 1,
        ("branch", "trace"): 1,
        ("static_call", "codec"): 1,
        ("target", "codec"): 1,
        ("call", "codec"): 2,
        ("dynamic_call", "filters"): 1,
    }
)
"""What the project's source declares, of C and of C++."""

MARKED = Counter({("dynamic_call", None): 1})
"""What the plugin notes besides: an indirect call that is not declared."""

Run = Callable[..., str]


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a Python environment, with a space in its path, that has our wheel in it."""
    path = tmp_path_factory.mktemp("packages") / "an environment"
    packages, dist = path / "lib" / "python3" / "site-packages", path / "dist"
    argv = [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(dist)]
    subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, timeout=60)
    (wheel,) = dist.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(packages)
    command = path / "bin" / "optpoline"
    command.parent.mkdir()
    command.write_text(
        f"#!/bin/sh\nPYTHONPATH={shlex.quote(str(packages))} "
        f'exec {shlex.quote(sys.executable)} -m optpoline.cli "$@"\n'
    )
    command.chmod(0o755)
    return path


@pytest.fixture
def run(environment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs a command and returns what it prints.

    The installed command is meant by "optpoline". The user's cache is one of the test's own, but
    for the plugin.
    """
    cache = tmp_path / "cache" / "optpoline"
    cache.mkdir(parents=True)
    (cache / "gcc-plugin").symlink_to(ROOT / "build" / "cache" / "optpoline" / "gcc-plugin")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache.parent))
    for name in ("CC", "CXX", "CFLAGS", "CXXFLAGS", "LDFLAGS", "MAKEFLAGS", "PKG_CONFIG_PATH"):
        monkeypatch.delenv(name, raising=False)

    def run(command: str, *arguments: str, **variables: str) -> str:
        if command == "optpoline":
            command = str(environment / "bin" / command)
        elif not shutil.which(command):
            pytest.skip(f"{command} is not installed")
        return subprocess.run(
            [command, *arguments],
            cwd=tmp_path,
            env={**os.environ, **variables},
            check=True,
            stdout=subprocess.PIPE,
            text=True,
            timeout=60,
        ).stdout.removesuffix("\n")

    return run


def check_program(
    path: Path,
    capsys: pytest.CaptureFixture[str],
    *,
    n_sites: int,
    is_marked: bool = False,
    is_opt_in: bool = False,
) -> None:
    """Check that a program of the project works, and what ``optpoline sites`` lists of it."""
    subprocess.run([path], check=True, timeout=10)
    assert main(["sites", str(path), "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert len(document["sites"]) == n_sites
    found = Counter((one["kind"], one["name"]) for one in document["declared"])
    assert found == (DECLARED + MARKED if is_marked else DECLARED)
    (filters,) = (one for one in document["declared"] if one["name"] == "filters")
    n_notes = sum(one["address"] == filters["address"] for one in document["declared"])
    assert n_notes == 1, "the header's note and the plugin's of one call are one"
    assert (filters["problem"] is None) is (n_sites > 0 and not is_opt_in)
    # To declare a dynamic call is not to opt in: that takes an attribute.
    assert (filters["problem"] == Refusal.EXCLUDED.value) is is_opt_in


@pytest.mark.parametrize(
    ("compilers", "options", "packages", "n_sites"),
    [
        (("gcc", "g++"), (), "optpoline", 0),
        (("gcc", "g++"), ("--plugin",), "optpoline-plugin optpoline-thunks", 2),
        (("clang", "clang++"), (), "optpoline-thunks", 2),
    ],
    ids=["header", "plugin and thunks", "thunks, clang"],
)
def test_project_that_uses_pkg_config(
    plugin: Path,
    run: Run,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    compilers: tuple[str, str],
    options: tuple[str, ...],
    packages: str,
    n_sites: int,
) -> None:
    run("pkg-config", "--version")
    run(compilers[0], "--version")
    path = run("optpoline", "cflags", "--cc", compilers[0], *options, "--pkg-config-path")
    words = [f"CC={compilers[0]}", f"CXX={compilers[1]}", f"PACKAGES={packages}"]
    run("make", "-f", str(PROJECT / "Makefile"), *words, PKG_CONFIG_PATH=path)
    check_program(tmp_path / "app", capsys, n_sites=n_sites, is_marked=bool(options))


def test_project_that_uses_cmake(
    plugin: Path, environment: Path, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix = run("optpoline", "cflags", "--cmake-prefix-path")
    options = [f"-DCMAKE_PREFIX_PATH={prefix}", "-DWITH_PLUGIN=ON", "-DCMAKE_CXX_STANDARD=17"]
    options.append("-DCMAKE_EXPORT_COMPILE_COMMANDS=ON")
    said = run("cmake", "-S", str(PROJECT), "-B", "build", *options, CC="gcc", CXX="g++")
    assert "-- Generating done" in said
    build = tmp_path / "build"
    cache = (build / "CMakeCache.txt").read_text()
    assert f"OPTPOLINE_COMMAND:FILEPATH={environment / 'bin' / 'optpoline'}\n" in cache
    run("cmake", "--build", "build", "--parallel", "2")
    check_program(build / "app", capsys, n_sites=0)
    check_program(build / "app_thunks", capsys, n_sites=2)
    check_program(build / "app_plugin", capsys, n_sites=2, is_marked=True, is_opt_in=True)

    built = tmp_path / "cache" / plugin.relative_to(ROOT / "build" / "cache")
    wanted = compile_flags(GCC, Form.MARKED_RETPOLINE, plugin=built, mode=Mode.OPT_IN)[1:]
    commands = json.loads((build / "compile_commands.json").read_text())
    ours = [shlex.split(one["command"]) for one in commands if "app_plugin" in one["command"]]
    assert len(ours) == 3
    for command in ours:
        assert [flag for flag in wanted if flag not in command] == []


@pytest.mark.parametrize("compiler", [GCC, CLANG])
def test_packages_say_what_cflags_and_ldflags_say(
    run: Run, tmp_path: Path, compiler: Compiler
) -> None:
    plugin = tmp_path / "a place" / "optpoline.so"
    directories = pkg_config_path(compiler, plugin=plugin, mode=Mode.OPT_IN)
    path = os.pathsep.join(map(str, directories))
    for form, package in ((Form.RETPOLINE, "thunks"), (Form.MARKED, "plugin")):
        name = f"optpoline-{package}"
        cflags = shlex.split(run("pkg-config", "--cflags", name, PKG_CONFIG_PATH=path))
        libs = shlex.split(run("pkg-config", "--libs", name, PKG_CONFIG_PATH=path))
        flags = compile_flags(compiler, form, plugin=plugin, mode=Mode.OPT_IN)
        (include,) = (Path(flag[2:]) for flag in cflags if flag.startswith("-I"))
        assert (include / "optpoline.h").is_file()
        assert sorted(cflags) == sorted([f"-I{include}", *flags[1:]])
        assert tuple(libs) == link_flags(form, plugin=plugin, mode=Mode.OPT_IN)


def test_one_release_everywhere(environment: Path, run: Run) -> None:
    (metadata,) = environment.rglob("*.dist-info/METADATA")
    release = re.search(r"^Version: (.*)$", metadata.read_text(), re.MULTILINE)
    assert release is not None
    path = run("optpoline", "cflags", "--cc", "gcc", "--pkg-config-path")
    for name in ("optpoline", "optpoline-thunks"):
        assert run("pkg-config", "--modversion", name, PKG_CONFIG_PATH=path) == release[1]


QUESTIONS = """
foreach(wish IN ITEMS "" 0.1 0.1.0 0.2 0.0.9 1 1.0 1.3 1.3.2 1.4 2.0)
    set(PACKAGE_FIND_VERSION "${wish}")
    include("${CMAKE_CURRENT_LIST_DIR}/cmake/optpoline/optpolineConfigVersion.cmake")
    message("'${wish}' ${PACKAGE_VERSION_COMPATIBLE} ${PACKAGE_VERSION_EXACT} ${PACKAGE_VERSION}")
endforeach()
set(PACKAGE_FIND_VERSION_RANGE TRUE)
set(PACKAGE_FIND_VERSION_MIN 0.1)
foreach(PACKAGE_FIND_VERSION_RANGE_MAX IN ITEMS INCLUDE EXCLUDE)
    foreach(PACKAGE_FIND_VERSION_MAX IN ITEMS 0.0.9 0.1.0 1.3.2 2)
        include("${CMAKE_CURRENT_LIST_DIR}/cmake/optpoline/optpolineConfigVersion.cmake")
        message("'${PACKAGE_FIND_VERSION_RANGE_MAX} ${PACKAGE_FIND_VERSION_MAX}'"
            " ${PACKAGE_VERSION_COMPATIBLE} ${PACKAGE_VERSION_EXACT} ${PACKAGE_VERSION}")
    endforeach()
endforeach()
"""


@pytest.mark.parametrize(
    ("release", "taken", "exact"),
    [
        (
            "0.1.0",
            [
                *("", "0.1", "0.1.0", "INCLUDE 0.1.0", "INCLUDE 1.3.2", "INCLUDE 2"),
                *("EXCLUDE 1.3.2", "EXCLUDE 2"),
            ],
            ["0.1", "0.1.0"],
        ),
        (
            "1.3.2",
            ["", "1", "1.0", "1.3", "1.3.2", "INCLUDE 1.3.2", "INCLUDE 2", "EXCLUDE 2"],
            ["1.3.2"],
        ),
    ],
    ids=["0.x", "1.x"],
)
def test_releases_that_cmake_takes(
    run: Run, tmp_path: Path, release: str, taken: list[str], exact: list[str]
) -> None:
    share = ROOT / "src" / "optpoline" / "share"
    shutil.copytree(share / "cmake", tmp_path / "cmake")
    (tmp_path / "pkgconfig").mkdir()
    package = (share / "pkgconfig" / "optpoline.pc").read_text()
    package = re.sub(r"(?m)^Version: .*$", f"Version: {release}", package)
    (tmp_path / "pkgconfig" / "optpoline.pc").write_text(package)
    (tmp_path / "ask.cmake").write_text(QUESTIONS)
    run("cmake", "--version")
    # CMake's messages go to stderr.
    said = run("sh", "-c", "exec cmake -P ask.cmake 2>&1").splitlines()
    answers = [shlex.split(line) for line in said]
    assert {answer[3] for answer in answers} == {release}
    assert [wish for wish, is_taken, _, _ in answers if is_taken == "TRUE"] == taken
    assert [wish for wish, _, is_exact, _ in answers if is_exact == "TRUE"] == exact


@pytest.mark.parametrize(
    ("before", "components", "said"),
    [
        ("", "engine", "there is no component engine"),
        ("", "plugin", "the plugin needs a project of C or C++"),
        (
            "set(CMAKE_C_COMPILER_LOADED 1)\nset(CMAKE_C_COMPILER no-such-compiler)",
            "thunks plugin",
            "there is no compiler no-such-compiler",
        ),
    ],
)
def test_components_that_cannot_be(
    run: Run, tmp_path: Path, before: str, components: str, said: str
) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        f"cmake_minimum_required(VERSION 3.15)\nproject(wishes NONE)\n{before}\n"
        f"find_package(optpoline REQUIRED COMPONENTS {components})\n"
    )
    run("cmake", "--version")
    prefix = run("optpoline", "cflags", "--cmake-prefix-path")
    (tmp_path / "err").touch()
    with pytest.raises(subprocess.CalledProcessError):
        run("sh", "-c", f"exec cmake -S . -B build '-Doptpoline_DIR={prefix}' 2>err")
    told = " ".join((tmp_path / "err").read_text().split())
    assert said in told


def test_project_that_does_without(run: Run, tmp_path: Path) -> None:
    (tmp_path / "CMakeLists.txt").write_text(
        "cmake_minimum_required(VERSION 3.15)\nproject(wishes NONE)\n"
        "find_package(optpoline REQUIRED OPTIONAL_COMPONENTS plugin)\n"
        "foreach(name IN ITEMS optpoline thunks plugin)\n"
        "    if(TARGET optpoline::${name})\n        message(STATUS found:${name})\n    endif()\n"
        "endforeach()\n"
    )
    prefix = run("optpoline", "cflags", "--cmake-prefix-path")
    said = run("cmake", "-S", ".", "-B", "build", f"-DCMAKE_PREFIX_PATH={prefix}")
    assert re.findall(r"found:(\w+)", said) == ["optpoline", "thunks"]


def test_written_once(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, directory = pkg_config_path(GCC)
    (package,) = directory.iterdir()
    before = package.stat()
    assert pkg_config_path(GCC)[1] == directory
    assert package.stat() == before
    assert before.st_mode & 0o777 == 0o644
    assert pkg_config_path(CLANG)[1] != directory
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(ToolchainError, match=r"optpoline-thunks\.pc cannot be written"):
        pkg_config_path(GCC)


@pytest.mark.parametrize("option", ["--pkg-config-path", "--cmake-prefix-path"])
def test_directories_as_json(
    fake_compiler: FakeCompiler, run: Run, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    compiler = str(fake_compiler())
    assert main(["cflags", "--cc", compiler, option]) == 0
    printed = capsys.readouterr().out.rstrip("\n").split(os.pathsep)
    assert main(["cflags", "--cc", compiler, option, "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document == {"schema_version": 1, "command": "cflags", "directories": printed}
    assert all(Path(directory).is_dir() for directory in printed)
