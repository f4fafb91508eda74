# SPDX-License-Identifier: Apache-2.0
"""A diagnosis as text: one line a check, its advice indented below."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from optpoline.process.checks import Check, CheckStatus
from optpoline.report.table import Colour, Style, printable

__all__ = ["format_checks"]

_COLOURS = {
    CheckStatus.OK: Colour.GREEN,
    CheckStatus.WARN: Colour.YELLOW,
    CheckStatus.FAIL: Colour.RED,
}


def format_checks(title: str, checks: Sequence[Check], style: Style) -> list[str]:
    """Return a heading and the checks below it, wrapped to the width."""
    lines = [style.paint(title, Colour.BOLD)]
    name_width = max((len(check.name) for check in checks), default=0)
    indent = " " * (name_width + 9)
    for check in checks:
        mark = check.status.value.ljust(4)
        text = printable(check.sentence)
        # Laid out without colour, which has no width, and painted afterwards.
        wrapped = textwrap.wrap(
            f"  {mark} {check.name.ljust(name_width)}  {text}",
            style.width,
            subsequent_indent=indent,
            break_on_hyphens=False,
            # A path that is too long is better copied whole.
            break_long_words=False,
        )
        wrapped[0] = wrapped[0].replace(mark, style.paint(mark, _COLOURS[check.status]), 1)
        lines += wrapped
        if check.advice is not None and check.status is not CheckStatus.OK:
            lines += textwrap.wrap(
                f"-> {printable(check.advice)}",
                style.width,
                initial_indent=indent,
                subsequent_indent=indent + "   ",
                break_on_hyphens=False,
                break_long_words=False,
            )
    return lines
