# SPDX-License-Identifier: Apache-2.0
"""The plugin, built once for all tests, and compilers that only pretend."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from optpoline.errors import ToolchainError
from optpoline.toolchain.compiler import find_compiler
from optpoline.toolchain.gcc_plugin import build_plugin, find_plugin_headers

ROOT = Path(__file__).resolve().parents[3]

FakeCompiler = Callable[..., Path]


@pytest.fixture(scope="session")
def plugin() -> Path:
    """Return the plugin for this machine's gcc."""
    return build_plugin_once()


def build_plugin_once() -> Path:
    """Return the plugin for this machine's gcc, built now if it is not there.

    It is kept below build/, under a name that says from which source it is, so that it is built
    again only when that has changed.
    """
    if not shutil.which("gcc"):
        pytest.skip("gcc is not installed")
    compiler = find_compiler("gcc")
    try:
        find_plugin_headers(compiler)
    except ToolchainError as error:
        pytest.skip(str(error))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(ROOT / "build" / "cache"))
        return build_plugin(compiler)


@pytest.fixture
def fake_compiler(tmp_path: Path) -> FakeCompiler:
    """Return a function that makes a command that answers as a compiler would."""

    def make(
        name: str = "gcc",
        *,
        version: str = "12.2.0",
        family: str = "gcc",
        machine: str = "#define __x86_64__ 1",
        plugin_dir: Path | str = "plugin",
        otherwise: str = "echo 'a.cc:1:2: error: no' >&2; exit 1",
    ) -> Path:
        numbers = version.split(".")
        keys = ("__GNUC__", "__GNUC_MINOR__", "__GNUC_PATCHLEVEL__")
        lines = [f"#define {key} {number}" for key, number in zip(keys, numbers, strict=True)]
        if family == "clang":
            clang_keys = ("__clang_major__", "__clang_minor__", "__clang_patchlevel__")
            lines += [f"#define {key} {no}" for key, no in zip(clang_keys, numbers, strict=True)]
            lines.append("#define __clang__ 1")
        path = tmp_path / "bin" / name
        path.parent.mkdir(exist_ok=True)
        macros = "\n".join([*lines, machine])
        path.write_text(
            "#!/bin/sh\ncase $1 in\n"
            f"-dM) cat <<'END'\n{macros}\nEND\n;;\n"
            f"-print-file-name=plugin) echo '{plugin_dir}';;\n"
            f"*) {otherwise};;\nesac\n"
        )
        path.chmod(0o755)
        return path

    return make
