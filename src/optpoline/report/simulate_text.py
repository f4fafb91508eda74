# SPDX-License-Identifier: Apache-2.0
"""What ``optpoline simulate`` says: policies side by side, and projections."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.report.session_text import count_of
from optpoline.report.table import Colour, Column, Style, format_table, printable
from optpoline.simulate.compare import Comparison
from optpoline.simulate.outcome import Outcome
from optpoline.simulate.projection import Measured, Projection

__all__ = ["format_comparison", "format_projection", "format_size"]

_COLUMNS = (
    Column(title="policy"),
    Column(title="hits", right=True),
    Column(title="cycles", right=True),
    Column(title="of best", right=True),
    Column(title="promoted", right=True),
    Column(title="again", right=True),
    Column(title="demoted", right=True),
    Column(title="adapted in", right=True),
    Column(title="worst", right=True),
    Column(title="missed", right=True),
    Column(title="code", right=True),
    Column(title="tables", right=True),
)

_PROJECTION_COLUMNS = (
    Column(title="sites", right=True),
    Column(title="CPUs", right=True),
    Column(title="tables reserved", right=True),
    Column(title="tables used", right=True),
    Column(title="code", right=True),
    Column(title="polls", right=True),
    Column(title="windows", right=True),
    Column(title="windows/s", right=True),
)


def format_size(size: float) -> str:
    """Return bytes in the largest unit that leaves a number above 1.

    >>> format_size(64), format_size(65536), format_size(5.5 * 2**30)
    ('64 B', '64 KiB', '5.5 GiB')
    """
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024 or unit == "GiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if size >= 100 or size == int(size) else f"{size:.1f} {unit}"


def format_comparison(comparison: Comparison, style: Style) -> list[str]:
    """Return the table of policies, best first, and what could be reached."""
    work = comparison.workload
    lines = [
        style.paint(
            f"{printable(work.name)}: {count_of(len(work.sites), 'site')},"
            f" {work.n_branches:,.0f} branches in {work.seconds:.1f} s,"
            f" {count_of(comparison.n_changes, 'change')} of hot sites",
            Colour.BOLD,
        )
    ]
    best = comparison.best.cycles
    ranked = sorted(comparison.outcomes, key=lambda outcome: outcome.cycles)
    rows = [_row(outcome, best) for outcome in (*ranked, *comparison.ideals)]
    lines += format_table(_COLUMNS, rows, style)
    lines.append(f"a retpoline takes {comparison.retpoline_cycles:g} cycles")
    return lines


def _row(outcome: Outcome, best: float) -> tuple[str, ...]:
    """Return the cells of one policy."""
    replay, adaptation = outcome.replay, outcome.adaptation
    did = ("-",) * 3
    memory = ("-",) * 2
    if replay is not None:
        did = (str(replay.n_promoted), str(replay.n_repromoted), str(replay.n_demoted))
        memory = (
            format_size(replay.memory.peak_code_size),
            format_size(replay.memory.peak_table_size),
        )
    return (
        outcome.policy,
        f"{outcome.hit_ratio * 100:.2f}%",
        f"{outcome.cycles:.2f}",
        f"{outcome.cycles / best * 100:.1f}%" if best else "-",
        *did,
        _milliseconds(adaptation.median_s),
        _milliseconds(adaptation.max_s),
        str(adaptation.n_missed) if adaptation.n_changes else "-",
        *memory,
    )


def _milliseconds(seconds: float | None) -> str:
    """Return a time, "-" where there is none."""
    return "-" if seconds is None else f"{seconds * 1e3:.0f} ms"


def format_projection(
    policy: str, measured: Measured, projections: Sequence[Projection], style: Style
) -> list[str]:
    """Return the table of projections, and what was measured for it."""
    lines = [style.paint(f"every site promoted, policy {policy}", Colour.BOLD)]
    rows = [
        (
            f"{one.n_sites:,}",
            str(one.n_cpus),
            format_size(one.reserved_size),
            format_size(one.table_size),
            format_size(one.code_size),
            f"{one.poll_ratio * 100:.2f}%",
            f"{one.window_ratio * 100:.2f}%",
            f"{one.windows_hz:.1f}",
        )
        for one in projections
    ]
    lines += format_table(_PROJECTION_COLUMNS, rows, style)
    polls = ", ".join(f"{n:,} sites {seconds * 1e6:.0f} us" for n, seconds in measured.poll_s)
    lines.append("polls, windows: share of one CPU that the controller takes")
    lines.append(
        f"measured here and now: a poll of {polls}; reading a cell of a row"
        f" {measured.read_cell_s * 1e9:.0f} ns; a decision {measured.decide_s * 1e6:.0f} us"
    )
    return lines
