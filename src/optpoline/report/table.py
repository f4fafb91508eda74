# SPDX-License-Identifier: Apache-2.0
"""Plain text tables that keep to the width of the terminal, and colours.

Columns have a natural width; where their sum is too much the flexible columns
give way, and their cells are cut in the middle (the ends of a path or a C++
name say most). Every text is one line without control characters: names come
from the target and must not steer the terminal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from optpoline.report.demangle import shorten_middle

__all__ = ["Colour", "Column", "Style", "format_table", "printable"]

MIN_FLEXIBLE_WIDTH = 8
"""A flexible column is never narrower, in characters."""

_GAP = "  "


class Colour(Enum):
    """ECMA-48 SGR codes in use."""

    BOLD = "1"
    DIM = "2"
    RED = "31"
    GREEN = "32"
    YELLOW = "33"


@dataclass(frozen=True, slots=True, kw_only=True)
class Style:
    """How text may look.

    Attributes:
        colour: Whether escape sequences may be used.
        width: Characters in a line.
    """

    colour: bool = False
    width: int = 80

    def paint(self, text: str, colour: Colour) -> str:
        """Return the text in a colour, or as it is where colours are off."""
        return f"\x1b[{colour.value}m{text}\x1b[0m" if self.colour and text else text


@dataclass(frozen=True, slots=True, kw_only=True)
class Column:
    """One column.

    Attributes:
        title: Its heading.
        right: Whether it is right-aligned (numbers).
        flexible: Whether it gives way when space is short.
    """

    title: str
    right: bool = False
    flexible: bool = False


def printable(text: str) -> str:
    r"""Replace what would steer a terminal.

    >>> printable("a\x1b[2Jb")
    'a?[2Jb'
    """
    return "".join(char if char.isprintable() else "?" for char in text)


def format_table(
    columns: Sequence[Column], rows: Sequence[Sequence[str]], style: Style
) -> list[str]:
    """Return the lines of a table: headings, then one line a row.

    Args:
        columns: What the columns are.
        rows: One cell a column each, any text.
        style: Width to keep to; flexible columns stop shrinking at
            ``MIN_FLEXIBLE_WIDTH``.
    """
    cells = [[printable(cell) for cell in row] for row in rows]
    widths = [
        max([len(column.title), *(len(row[i]) for row in cells)])
        for i, column in enumerate(columns)
    ]
    _shrink(widths, columns, style.width - len(_GAP) * (len(columns) - 1))
    heading = _format_row([column.title for column in columns], columns, widths)
    lines = [style.paint(heading, Colour.BOLD)]
    lines += [_format_row(row, columns, widths) for row in cells]
    return lines


def _shrink(widths: list[int], columns: Sequence[Column], room: int) -> None:
    """Take characters from the widest flexible column until all fit, or none can give."""
    flexible = [i for i, column in enumerate(columns) if column.flexible]
    excess = sum(widths) - room
    while excess > 0 and flexible:
        widest = max(flexible, key=lambda i: widths[i])
        if widths[widest] <= MIN_FLEXIBLE_WIDTH:
            return
        # Down to the next widest at once: names may have thousands of characters.
        others = [widths[i] for i in flexible if i != widest]
        floor = max([MIN_FLEXIBLE_WIDTH, *(width for width in others if width < widths[widest])])
        step = max(1, min(excess, widths[widest] - floor))
        widths[widest] -= step
        excess -= step


def _format_row(cells: Sequence[str], columns: Sequence[Column], widths: Sequence[int]) -> str:
    """Align and cut one row."""
    shown: list[str] = []
    for cell, column, width in zip(cells, columns, widths, strict=True):
        cut = shorten_middle(cell, width)
        shown.append(cut.rjust(width) if column.right else cut.ljust(width))
    return _GAP.join(shown).rstrip()
