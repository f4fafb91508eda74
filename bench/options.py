# SPDX-License-Identifier: Apache-2.0
"""What the command lines of the benchmarks and of the tortures read alike."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence

__all__ = ["names_of"]


def names_of(known: Sequence[str], kind: str) -> Callable[[str], list[str]]:
    """Return a reader of comma-separated names, for ``argparse``.

    Args:
        known: The names that there are.
        kind: What they name, for the error.
    """

    def read(text: str) -> list[str]:
        names = [name.strip() for name in text.split(",") if name.strip()]
        unknown = sorted(set(names) - set(known))
        if unknown or not names:
            raise argparse.ArgumentTypeError(f"no such {kind}: {', '.join(unknown) or repr(text)}")
        return names

    return read
