# SPDX-License-Identifier: Apache-2.0
"""The Python examples of the documentation, to be run."""

from __future__ import annotations

from pathlib import Path

import optpoline

__all__ = ["OF_DECLARED", "read_examples", "run_example"]

_ROOT = Path(__file__).resolve().parents[2]

OF_DECLARED = "optpoline.declared("
"""What an example has that needs a program with declared things."""


def read_examples(name: str) -> list[str]:
    """Return the Python examples of a page, with less patience than people have."""
    text = (_ROOT / name).read_text().replace("seconds=60", "seconds=0.2")
    return [part.split("```")[0] for part in text.split("```python\n")[1:]]


def run_example(example: str, name: str, pid: int) -> None:
    """Run one on a process."""
    exec(compile(example, name, "exec"), {"pid": pid, "optpoline": optpoline})
