# SPDX-License-Identifier: Apache-2.0
"""What a row of the torture table is: how much it is to do, and what it has to show.

A row's module is listed in ``torture/rows/__init__.py`` and has a module-level ``ROW``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

__all__ = ["Figure", "Outcome", "Row", "Scale"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scale:
    """How much of the full run is to be done.

    Attributes:
        share: 1.0 for the full run, else the row's ``quick_s / full_s``.
        seed: Where all of the row's random numbers come from.

    >>> Scale(share=0.02, seed=7).of(2000)
    40
    """

    share: float
    seed: int

    def __post_init__(self) -> None:
        """Check the share."""
        if not 0.0 < self.share <= 1.0:
            raise ValueError(f"a share of {self.share} is not within (0, 1]")

    @property
    def is_full(self) -> bool:
        """Whether this is the full run."""
        return self.share >= 1.0

    def of(self, full: int, least: int = 1) -> int:
        """Return a count of the full run scaled down, at least ``least``, at most ``full``."""
        return min(full, max(least, round(full * self.share)))


@dataclass(frozen=True, slots=True, kw_only=True)
class Figure:
    """One number of a row beside what it has to be.

    Attributes:
        name: What was measured, e.g. "wrong results".
        value: What it came to, as text with its unit.
        bar: What it has to be on this scale, e.g. "0" or "≤ 5 ms"; "" if only reported.
        is_met: Whether it is; None if the figure is only reported.
    """

    name: str
    value: str
    bar: str
    is_met: bool | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What a row has shown.

    Attributes:
        row: Its name.
        scale: What was done, e.g. "40 of 2,000 cycles".
        figures: At least one; the row passes if none of them has ``is_met`` False.
        notes: Sentences worth telling.
        seconds: How long it took.
    """

    row: str
    scale: str
    figures: tuple[Figure, ...]
    notes: tuple[str, ...]
    seconds: float

    @property
    def is_met(self) -> bool:
        """Whether no figure misses its bar."""
        return all(figure.is_met is not False for figure in self.figures)


class Row(Protocol):
    """One invariant under load.

    Attributes:
        name: As given to ``--only``.
        about: One line: what is done.
        quick_s: Seconds that its part of the short run may take.
        full_s: Seconds that its full run takes, about; ``quick_s / full_s`` is the share.
    """

    @property
    def name(self) -> str:
        """As given to ``--only``."""

    @property
    def about(self) -> str:
        """One line: what is done."""

    @property
    def quick_s(self) -> float:
        """Seconds that its part of the short run may take."""

    @property
    def full_s(self) -> float:
        """Seconds that its full run takes, about."""

    def run(self, scale: Scale) -> Outcome:
        """Do it and say what it showed.

        Raises:
            MissingTool: if a program it needs is not installed.
            TortureError: if it could not be measured at all.
        """
