# SPDX-License-Identifier: Apache-2.0
"""The package's public names: all there, shown to consoles, and documented."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

import optpoline

DOCS = Path(__file__).resolve().parent.parent.parent / "docs" / "api.md"


def test_consoles_are_shown_every_name() -> None:
    program = "import optpoline; print(*dir(optpoline))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert set(optpoline.__all__) <= set(done.stdout.decode().split())


@pytest.mark.parametrize("name", optpoline.__all__)
def test_names_are_what_they_are_called(name: str) -> None:
    assert getattr(optpoline, name).__name__ == name


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Sesion'"):
        _ = optpoline.Sesion


@pytest.mark.parametrize("name", optpoline.__all__)
def test_every_name_is_documented(name: str) -> None:
    assert f"`{name}" in DOCS.read_text()
