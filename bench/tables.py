# SPDX-License-Identifier: Apache-2.0
"""Results as text for people: one row per workload, times in milliseconds."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from bench import statistics
from bench.build import Variant
from bench.figures import Figure
from bench.statistics import Estimate
from bench.verdicts import judge_group, judge_workload
from bench.workload import PROMOTED, Measured

__all__ = ["console", "percent", "print_figures", "print_measured"]

console = Console(width=110, highlight=False)


def percent(estimate: Estimate) -> str:
    """Write a share with its interval.

    >>> percent(Estimate(value=0.97, low=0.965, high=0.981))
    '97.0 % (96.5 to 98.1)'
    """
    value, low, high = (100 * share for share in (estimate.value, estimate.low, estimate.high))
    return f"{value:.1f} % ({low:.1f} to {high:.1f})"


def print_measured(
    title: str,
    rows: Sequence[Measured],
    *,
    mean: Estimate | None = None,
    peer: Estimate | None = None,
    with_bars: bool = True,
) -> None:
    """Print the medians of each variant side by side, what was recovered, and the verdicts.

    Args:
        title: Name of the group.
        rows: Its workloads.
        mean: Geometric mean of what promotion recovered.
        peer: Geometric mean of what gcc's profile-guided build recovers instead.
        with_bars: Whether to hold the results against the bars.
    """
    if not rows:
        return
    table = Table(title=f"{title} (medians, ms)", title_justify="left")
    table.add_column("workload")
    names = list(rows[0].samples)
    for name in names:
        table.add_column("promoted live" if name == PROMOTED else name, justify="right")
    is_promoted = PROMOTED in names
    table.add_column("recovered" if is_promoted else "overhead", justify="right")
    if with_bars:
        table.add_column("bar")
    for row in rows:
        medians = [f"{statistics.median(row.samples[name]).value / 1e6:.2f}" for name in names]
        share = percent(row.recovered if is_promoted else row.overhead)
        verdict = [judge_workload(row).word] if with_bars else []
        table.add_row(row.name, *medians, share, *verdict)
    console.print(table)
    without = Variant.NO_TABLES.value
    for row in rows:
        if is_promoted and without in row.samples:
            against = statistics.recovered(
                row.samples[without], row.of(Variant.RETPOLINE), row.samples[PROMOTED]
            )
            console.print(f"{row.name}: {percent(against)} recovered against {without}")
    if mean is not None:
        word = f", {judge_group(title, rows).word}" if with_bars else ""
        console.print(f"geometric mean recovered: {percent(mean)}{word}")
    if peer is not None:
        console.print(f"geometric mean recovered by gcc -fprofile-use instead: {percent(peer)}")


def print_figures(title: str, figures: Sequence[Figure]) -> None:
    """Print the figures of attaching with their bars."""
    table = Table(title=title, title_justify="left")
    for name in ("figure", "value", "bar", ""):
        table.add_column(name, justify="left" if name in ("figure", "") else "right")
    for figure in figures:
        table.add_row(
            figure.name, f"{figure.value:.3g} {figure.unit}", figure.bar_text, figure.verdict
        )
    console.print(table)
