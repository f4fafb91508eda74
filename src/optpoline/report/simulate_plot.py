# SPDX-License-Identifier: Apache-2.0
"""A plot of policies over time as SVG, without a plotting library.

Two panels over the same seconds: share of branches that went directly, and cycles a
branch. A file of some ten kilobytes that any browser shows; the text is text, so that
it can be tested and searched.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

import numpy as np
from numpy.typing import NDArray

from optpoline.simulate.compare import Comparison
from optpoline.simulate.outcome import Outcome

__all__ = ["format_plot"]

WIDTH, HEIGHT = 960, 620
LEFT, RIGHT, TOP = 64, 190, 48
PANEL_HEIGHT, PANEL_GAP = 230, 44
MAX_POINTS = 400
"""Points of a line; slices are averaged into so many."""

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
"""Distinct to the colour-blind: M. Okabe and K. Ito, "Color Universal Design" (2008)."""

_IDEAL_COLOUR = "#999999"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Panel:
    """One pair of axes."""

    title: str
    top: int
    seconds: float
    ceiling: float
    unit: str

    def x(self, seconds: float) -> float:
        """Return where a moment is."""
        return LEFT + (WIDTH - LEFT - RIGHT) * seconds / max(1e-9, self.seconds)

    def y(self, value: float) -> float:
        """Return where a value is."""
        return self.top + PANEL_HEIGHT * (1.0 - min(1.0, value / self.ceiling))


def format_plot(comparison: Comparison) -> str:
    """Return an SVG document."""
    seconds = comparison.workload.seconds
    lines = [*comparison.outcomes, *comparison.ideals]
    ceiling = _round_up(comparison.retpoline_cycles)
    hits = _Panel(
        title="branches that go directly", top=TOP, seconds=seconds, ceiling=1.0, unit="%"
    )
    cycles = _Panel(
        title="cycles a branch (cost model)",
        top=TOP + PANEL_HEIGHT + PANEL_GAP,
        seconds=seconds,
        ceiling=ceiling,
        unit="",
    )
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}"'
        f' width="{WIDTH}" height="{HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{LEFT}" y="24" font-size="15">{escape(comparison.workload.name)}</text>',
        *_axes(hits),
        *_axes(cycles),
    ]
    for number, outcome in enumerate(lines):
        parts.append(_line(hits, outcome, outcome.hits, number))
        parts.append(_line(cycles, outcome, outcome.slice_cycles, number))
    parts += _legend(lines)
    parts.append("</svg>")
    return "\n".join(part for part in parts if part) + "\n"


def _round_up(value: float) -> float:
    """Return a round number from ``value`` on."""
    step = 10.0 ** math.floor(math.log10(max(1.0, value)))
    return math.ceil(value / step) * step


def _axes(panel: _Panel) -> list[str]:
    """Return frame, grid and numbers of a panel."""
    right, bottom = WIDTH - RIGHT, panel.top + PANEL_HEIGHT
    parts = [f'<text x="{LEFT}" y="{panel.top - 8}" font-weight="bold">{panel.title}</text>']
    for fifth in range(6):
        value = panel.ceiling * fifth / 5
        y = panel.y(value)
        shown = f"{value * 100:.0f}%" if panel.unit == "%" else f"{value:g}"
        parts.append(f'<path d="M{LEFT} {y:.1f}H{right}" stroke="#dddddd"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y + 4:.1f}" text-anchor="end">{shown}</text>')
    for fifth in range(6):
        moment = panel.seconds * fifth / 5
        x = panel.x(moment)
        parts.append(
            f'<text x="{x:.1f}" y="{bottom + 18}" text-anchor="middle">{moment:g} s</text>'
        )
    parts.append(
        f'<rect x="{LEFT}" y="{panel.top}" width="{right - LEFT}" height="{PANEL_HEIGHT}"'
        ' fill="none" stroke="#666666"/>'
    )
    return parts


def _colour(outcome: Outcome, number: int) -> str:
    """Return the colour of a line; ideals are grey."""
    return _IDEAL_COLOUR if outcome.replay is None else _COLOURS[number % len(_COLOURS)]


def _dashes(outcome: Outcome, number: int) -> str:
    """Return the dashes of a line; ideals have some, each its own."""
    return "" if outcome.replay is not None else f' stroke-dasharray="{2 + 3 * (number % 2)} 3"'


def _line(panel: _Panel, outcome: Outcome, values: NDArray[np.float64], number: int) -> str:
    """Return one line, with gaps where nothing ran."""
    per_point = max(1, -(-len(values) // MAX_POINTS))
    commands: list[str] = []
    pen = "M"
    for first in range(0, len(values), per_point):
        chunk = values[first : first + per_point]
        there = chunk[~np.isnan(chunk)]
        if not len(there):
            pen = "M"
            continue
        moment = panel.seconds * (first + len(chunk) / 2) / len(values)
        commands.append(f"{pen}{panel.x(moment):.1f} {panel.y(float(there.mean())):.1f}")
        pen = "L"
    if not commands:
        return ""
    return (
        f'<path d="{"".join(commands)}" fill="none" stroke="{_colour(outcome, number)}"'
        f' stroke-width="1.5"{_dashes(outcome, number)}/>'
    )


def _legend(lines: Sequence[Outcome]) -> list[str]:
    """Return the names beside the panels."""
    x = WIDTH - RIGHT + 16
    parts: list[str] = []
    for number, outcome in enumerate(lines):
        y = TOP + 14 + 22 * number
        stroke = f'stroke="{_colour(outcome, number)}"{_dashes(outcome, number)}'
        parts.append(f'<path d="M{x} {y - 4}h24" {stroke} stroke-width="2"/>')
        label = f"{outcome.policy} {outcome.cycles:.2f}"
        parts.append(f'<text x="{x + 32}" y="{y}">{escape(label)}</text>')
    return parts
