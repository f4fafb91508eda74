# SPDX-License-Identifier: Apache-2.0
"""Static keys and calls, and what they are set to, as text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from optpoline.controller.summary import KeySummary, StaticCallSummary
from optpoline.report.session_text import count_of
from optpoline.report.table import Column, Style, format_table

__all__ = ["format_keys", "format_static_calls", "settings_notes"]


def format_keys(keys: Sequence[KeySummary], style: Style) -> list[str]:
    """Return a table of keys, a line each."""
    columns = (
        Column(title="key", flexible=True),
        Column(title="state"),
        Column(title="begins"),
        Column(title="count", right=True),
        Column(title="branches", right=True),
        Column(title="source", flexible=True),
    )
    rows = [
        (
            key.name,
            key.state.value,
            "on" if key.begins_on else "off",
            str(key.count),
            str(key.n_branches),
            _place(key.file, key.line),
        )
        for key in keys
    ]
    return format_table(columns, rows, style)


def format_static_calls(calls: Sequence[StaticCallSummary], style: Style) -> list[str]:
    """Return a table of static calls, a line each."""
    columns = (
        Column(title="static call", flexible=True),
        Column(title="calls", flexible=True),
        Column(title="begins", flexible=True),
        Column(title="may call", flexible=True),
        Column(title="form"),
        Column(title="source", flexible=True),
    )
    rows = [
        (
            call.name,
            call.target or "mixed",
            call.default,
            ", ".join(call.targets),
            "out-of-line" if call.is_out_of_line else count_of(call.n_calls, "call"),
            _place(call.file, call.line),
        )
        for call in calls
    ]
    return format_table(columns, rows, style)


def settings_notes(keys: Sequence[KeySummary], calls: Sequence[StaticCallSummary]) -> Iterator[str]:
    """Yield a sentence for each thing that was left half changed."""
    for what, name in (
        *(("static key", key.name) for key in keys if key.is_torn),
        *(("static call", call.name) for call in calls if call.is_torn),
    ):
        yield (
            f"note: the {what} {name} was left half changed, by a controller that was killed: "
            "set it again, or optpoline detach finishes it"
        )


def _place(file: str | None, line: int | None) -> str:
    """Name a place in the source."""
    name = "-" if file is None else file.rsplit("/", 1)[-1]
    return f"{name}:{line}" if line else name
