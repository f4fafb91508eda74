# SPDX-License-Identifier: Apache-2.0
"""What a running program's modules declare is read from its memory."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

import optpoline

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"


@pytest.fixture
def library(tmp_path: Path) -> Path:
    """Build the project as a stripped library."""
    path = tmp_path / "libdeclared.so"
    sources = [str(PROJECT / "main.c"), str(PROJECT / "other.c")]
    flags = ["-O2", "-fPIC", "-shared", "-s", f"-I{INCLUDE}"]
    subprocess.run(["gcc", *flags, *sources, "-o", str(path)], check=True)
    return path


@pytest.fixture
def user(library: Path, tmp_path: Path) -> Iterator[subprocess.Popen[str]]:
    """Start a program that has the library mapped."""
    path = tmp_path / "user"
    subprocess.run(["gcc", str(PROJECT / "user.c"), str(library), "-o", str(path)], check=True)
    with subprocess.Popen(
        [str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield process
        process.kill()


def test_declarations_of_a_mapped_library(library: Path, user: subprocess.Popen[str]) -> None:
    in_file = optpoline.find_sites(library).declared
    assert len(in_file) > 20
    library.unlink()
    in_memory = optpoline.find_sites(user.pid).declared
    assert len({one.address - one.offset for one in in_memory}) == 1
    assert {one.module for one in in_memory} == {str(library)}
    assert [replace(one, address=one.offset) for one in in_memory] == list(in_file)
