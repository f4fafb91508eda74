# SPDX-License-Identifier: Apache-2.0
"""Results as text for people: one row per workload, times in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench import statistics
from bench.build import Variant
from bench.statistics import Estimate
from bench.workload import PROMOTED, Measured

__all__ = ["console", "percent", "print_measured"]

console = Console(width=100, highlight=False)


def percent(estimate: Estimate) -> str:
    """Write a share with its interval.

    >>> percent(Estimate(value=0.97, low=0.965, high=0.981))
    '97.0 % (96.5 to 98.1)'
    """
    value, low, high = (100 * share for share in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def print_measured(title: str, rows: Sequence[Measured]) -> None:
    """Print the medians of each variant side by side, and what was recovered."""
    table = Table(title=title, title_justify="left")
    table.add_column("workload")
    with_peer = any(Variant.PGO.value in row.samples for row in rows)
    names = [Variant.PLAIN.value, Variant.RETPOLINE.value]
    names += [Variant.PGO.value] if with_peer else []
    for name in names:
        table.add_column(f"{name}, ms", justify="right")
    if any(PROMOTED in row.samples for row in rows):
        table.add_column("promoted live, ms", justify="right")
        table.add_column("recovered", justify="right")
    for row in rows:
        cells = [row.name]
        shown = [*names, PROMOTED] if PROMOTED in row.samples else names
        cells += [f"{statistics.median(row.samples[name]).value / 1e6:.1f}" for name in shown]
        if PROMOTED in row.samples:
            cells.append(percent(row.recovered))
        table.add_row(*cells)
    console.print(table)
