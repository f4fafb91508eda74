# SPDX-License-Identifier: Apache-2.0
"""Build the small programs that sites are looked for in, and load them as a process would."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

TARGETS = Path(__file__).parents[2] / "targets"

Build = Callable[..., Path]


@pytest.fixture
def build(tmp_path: Path) -> Build:
    """Give a function that compiles files of tests/targets with gcc and returns the result."""

    def compile_with_gcc(*arguments: str, name: str = "program") -> Path:
        output = tmp_path / name
        files = [str(TARGETS / word) if word.startswith("sites_") else word for word in arguments]
        # Some distributions default to -fcf-protection=full, which excludes thunks.
        command = ["gcc", "-fcf-protection=none", *files, "-o", str(output)]
        subprocess.run(command, check=True, capture_output=True, text=True)
        return output

    return compile_with_gcc


@pytest.fixture
def strip(tmp_path: Path) -> Callable[[Path], Path]:
    """Give a function that returns a stripped copy of a program."""

    def strip_all(program: Path) -> Path:
        output = tmp_path / f"{program.name}.stripped"
        subprocess.run(["strip", "-s", str(program), "-o", str(output)], check=True)
        return output

    return strip_all
