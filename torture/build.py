# SPDX-License-Identifier: Apache-2.0
"""Compile the programs that rows attach to."""

from __future__ import annotations

import subprocess
from pathlib import Path

from torture.errors import TortureError
from torture.paths import BUILD, TARGETS

__all__ = ["RETPOLINE", "build_target"]

RETPOLINE = (
    "-O2",
    "-g",
    "-pthread",
    "-fcf-protection=none",
    "-mindirect-branch=thunk",
    "-mindirect-branch-register",
)
"""As the kernel builds itself; -fcf-protection=none because gcc refuses both together."""

_TIMEOUT_S = 120.0


def build_target(name: str, *flags: str) -> Path:
    """Compile ``torture/targets/NAME.c`` with the retpoline flags and these; return the program.

    Raises:
        TortureError: if gcc is missing or refuses.
    """
    BUILD.mkdir(parents=True, exist_ok=True)
    program = BUILD / name
    command = ["gcc", *RETPOLINE, *flags, "-o", str(program), str(TARGETS / f"{name}.c")]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except FileNotFoundError as error:
        raise TortureError("gcc is not installed: apt install gcc libc6-dev") from error
    except subprocess.TimeoutExpired as error:
        raise TortureError(f"gcc did not finish {name}.c within {_TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise TortureError(f"gcc refuses {name}.c:\n{done.stderr}")
    return program
