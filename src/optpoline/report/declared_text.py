# SPDX-License-Identifier: Apache-2.0
"""The list of what the sources of a program declare, as text."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.controller.summary import DeclaredKind, DeclaredSummary
from optpoline.report.demangle import shorten_middle
from optpoline.report.table import Colour, Column, Style, format_table, printable

__all__ = ["format_declared"]

_COLUMNS = (
    Column(title="address", right=True),
    Column(title="declared"),
    Column(title="name", flexible=True),
    Column(title="begins", flexible=True),
    Column(title="source", flexible=True),
    Column(title="changeable", flexible=True),
)


def format_declared(declared: Sequence[DeclaredSummary], style: Style) -> list[str]:
    """Return one block of lines for each module that declares something."""
    lines: list[str] = []
    for path in dict.fromkeys(one.module for one in declared):
        own = [one for one in declared if one.module == path]
        if lines:
            lines.append("")
        title = f"{len(own)} declared in its source"
        room = max(16, style.width - len(title) - 2)
        head = f"{shorten_middle(printable(path), room)}: {title}"
        lines.append(style.paint(head, Colour.BOLD))
        lines += format_table(_COLUMNS, [_row(one) for one in own], style)
    return lines


def _row(one: DeclaredSummary) -> tuple[str, ...]:
    """Return the cells of one line."""
    place = "-" if one.file is None else one.file.rsplit("/", 1)[-1]
    return (
        f"{one.address:#x}",
        one.kind.value.replace("_", " "),
        one.name or "-",
        _begins(one),
        f"{place}:{one.line}" if one.line else place,
        "yes" if one.problem is None else f"no: {one.problem}",
    )


def _begins(one: DeclaredSummary) -> str:
    """Say what it is before anything changes it."""
    match one.kind, one.begins_on:
        case DeclaredKind.KEY, is_on:
            return "on" if is_on else "off"
        case DeclaredKind.BRANCH, is_jump:
            return "jump" if is_jump else "nop"
        case _:
            return one.type or "-"
