# SPDX-License-Identifier: Apache-2.0
"""What a compiler is, by its own word."""

from __future__ import annotations

from pathlib import Path

import pytest

from optpoline.errors import ToolchainError
from optpoline.toolchain.compiler import Compiler, Family, find_compiler
from tests.unit.toolchain.conftest import FakeCompiler


def test_gcc_by_another_name(fake_compiler: FakeCompiler) -> None:
    path = fake_compiler("cc", version="13.3.0")
    compiler = find_compiler(str(path))
    assert (compiler.family, compiler.version, compiler.major) == (Family.GCC, "13.3.0", 13)
    assert compiler.name == f"{path} (GCC 13.3.0)"


def test_clang_says_that_it_is_gcc_too(fake_compiler: FakeCompiler) -> None:
    compiler = find_compiler(str(fake_compiler("gcc", version="14.0.6", family="clang")))
    assert (compiler.family, compiler.version) == (Family.CLANG, "14.0.6")


def test_a_command_of_several_words(fake_compiler: FakeCompiler) -> None:
    path = fake_compiler("gcc")
    assert find_compiler(f"env {path}").command == ("env", str(path))


@pytest.mark.parametrize(
    ("command", "said"),
    [
        ("no-such-compiler", "there is no compiler no-such-compiler"),
        ("cat", "cat is no C compiler"),
        ("", "the name of the compiler is empty"),
        ("'gcc", "is no command"),
    ],
)
def test_what_is_no_compiler(command: str, said: str) -> None:
    with pytest.raises(ToolchainError, match=said):
        find_compiler(command)


@pytest.mark.parametrize("machine", ["#define __i386__ 1", "#define __aarch64__ 1"])
def test_other_machines(fake_compiler: FakeCompiler, machine: str) -> None:
    with pytest.raises(ToolchainError, match="makes no 64-bit code for x86"):
        find_compiler(str(fake_compiler(machine=machine)))


def test_x32(fake_compiler: FakeCompiler) -> None:
    machine = "#define __x86_64__ 1\n#define __ILP32__ 1"
    with pytest.raises(ToolchainError, match="makes no 64-bit code for x86"):
        find_compiler(str(fake_compiler(machine=machine)))


@pytest.mark.parametrize(
    ("command", "cxx"),
    [
        ("gcc", "g++"),
        ("gcc-13", "g++-13"),
        ("cc", "c++"),
        ("/opt/x/bin/x86_64-linux-gnu-gcc-12", "/opt/x/bin/x86_64-linux-gnu-g++-12"),
        ("ccache gcc -pipe", "ccache g++ -pipe"),
        ("/gcc-dir/tool", "/gcc-dir/tool"),
    ],
)
def test_its_cxx_compiler(command: str, cxx: str) -> None:
    compiler = Compiler(command=tuple(command.split()), family=Family.GCC, version="12.2.0")
    assert " ".join(compiler.cxx_command) == cxx


def test_a_file_that_cannot_be_run(tmp_path: Path) -> None:
    path = tmp_path / "gcc"
    path.write_text("")
    with pytest.raises(ToolchainError, match="cannot be run: Permission denied"):
        find_compiler(str(path))
