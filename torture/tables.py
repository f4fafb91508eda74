# SPDX-License-Identifier: Apache-2.0
"""Outcomes as text for people: figures beside their bars, met or MISSED."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from torture.row import Figure, Outcome, Row, Scale

__all__ = ["console", "print_outcome", "print_start", "print_totals", "verdict_word"]

console = Console(width=110, highlight=False)


def verdict_word(figure: Figure) -> str:
    """Say whether a figure meets its bar.

    >>> verdict_word(Figure(name="wrong results", value="0", bar="0", is_met=True))
    'met'
    """
    if figure.is_met is None:
        return "reported"
    return "met" if figure.is_met else "MISSED"


def print_start(row: Row, scale: Scale) -> None:
    """Print what is about to be done, so that a run that hangs can be told."""
    share = "in full" if scale.is_full else f"{100 * scale.share:.2g} % of the full run"
    console.print(f"{row.name}: {escape(row.about)}; {share}, seed {scale.seed}")


def print_outcome(outcome: Outcome) -> None:
    """Print the figures of a row beside their bars, and its notes."""
    title = f"{outcome.row}: {outcome.scale} in {outcome.seconds:.0f} s"
    table = Table(title=escape(title), title_justify="left")
    table.add_column("figure")
    table.add_column("value", justify="right")
    table.add_column("bar", justify="right")
    table.add_column("")
    for figure in outcome.figures:
        row = (figure.name, figure.value, figure.bar, verdict_word(figure))
        table.add_row(*(escape(cell) for cell in row))
    console.print(table)
    for note in outcome.notes:
        console.print(f"  {escape(note)}")
    console.print()


def print_totals(outcomes: Sequence[Outcome]) -> None:
    """Print which rows met their bars."""
    missed = [outcome.row for outcome in outcomes if not outcome.is_met]
    seconds = sum(outcome.seconds for outcome in outcomes)
    verdict = f"MISSED: {', '.join(missed)}" if missed else "all met"
    console.print(f"{len(outcomes)} rows in {seconds:.0f} s: {verdict}")
