# SPDX-License-Identifier: Apache-2.0
"""Numbers with their nouns, for sentences that people read."""

from __future__ import annotations

__all__ = ["count_of"]


def count_of(number: int, noun: str, plural: str = "s") -> str:
    """Return a number with its noun; ``plural`` is appended where it is not one.

    >>> count_of(1, "site"), count_of(2, "site")
    ('1 site', '2 sites')
    """
    return f"{number} {noun}" if number == 1 else f"{number} {noun}{plural}"
