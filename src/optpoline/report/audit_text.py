# SPDX-License-Identifier: Apache-2.0
"""An audit as text: what was looked at, then one line for each thing that is odd."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from optpoline.controller.audit_report import AuditReport, Fault, ForeignChange, ForeignKind
from optpoline.report.session_text import count_of
from optpoline.report.table import Colour, Style, printable

__all__ = ["MAX_SHOWN", "format_audit"]

MAX_SHOWN = 20
"""Faults, and foreign changes, shown without ``-v``."""

_WORDS = {
    ForeignKind.INT3: "int3: a breakpoint or a uprobe",
    ForeignKind.RELOCATION: "text relocation",
    ForeignKind.SITE: "another patcher's bytes over a site",
    ForeignKind.RIGHTS: "code that the program can write",
    ForeignKind.OTHER: "text differs from its file",
}


def format_audit(report: AuditReport, style: Style, *, with_all: bool) -> list[str]:
    """Return the lines of a report.

    Args:
        report: What was found.
        style: How they may look.
        with_all: Whether to show more than ``MAX_SHOWN`` of a kind.
    """
    limit = None if with_all else MAX_SHOWN
    lines = [_format_verdict(report, style), *_format_counts(report)]
    lines += _format_faults(report.faults, style, limit)
    lines += _format_foreign(report.foreign_changes, style, limit)
    return lines + [f"note: {printable(note)}" for note in report.notes]


def _format_verdict(report: AuditReport, style: Style) -> str:
    """Return the first line."""
    name = f"process {report.pid}"
    if report.faults:
        verdict = style.paint(f"{count_of(len(report.faults), 'fault')} found", Colour.RED)
        return f"{name}: {verdict}"
    if not report.arenas and not report.settings:
        return f"{name}: nothing of optpoline is in it"
    return f"{name}: {style.paint('all is well', Colour.GREEN)}"


def _format_counts(report: AuditReport) -> list[str]:
    """Return what was looked at."""
    lines: list[str] = []
    if report.arenas:
        alive = "still running" if report.controller_alive else "gone"
        gone = f", {report.gone} of modules that are gone" if report.gone else ""
        lines = [
            f"  {count_of(report.promoted, 'site')} promoted or learning, {report.baseline} at"
            f" baseline{gone}; controller {report.controller_pid} ({alive})",
            f"  {count_of(report.blocks, 'live block')} and {report.retired} retired in"
            f" {count_of(report.arenas, 'arena')}",
        ]
    if report.settings:
        lines.append(f"  set: {printable(', '.join(report.settings))}")
    return [*lines, f"  text of {count_of(report.modules, 'module')} compared with its file"]


def _format_faults(faults: Sequence[Fault], style: Style, limit: int | None) -> list[str]:
    """Return one entry for each fault, wrapped to the width."""
    lines: list[str] = []
    for fault in faults[:limit]:
        wrapped = textwrap.wrap(
            f"  {fault.kind.value}: {printable(fault.sentence)}",
            style.width,
            subsequent_indent="    ",
            break_on_hyphens=False,
        )
        mark = f"{fault.kind.value}:"
        wrapped[0] = wrapped[0].replace(mark, style.paint(mark, Colour.RED), 1)
        lines += wrapped
    return lines + _format_rest(len(faults), limit)


def _format_foreign(changes: Sequence[ForeignChange], style: Style, limit: int | None) -> list[str]:
    """Return one line for each foreign change."""
    if not changes:
        return []
    heading = f"{count_of(len(changes), 'foreign change')}, not of optpoline's making"
    lines = [style.paint(heading, Colour.YELLOW)]
    for change in changes[:limit]:
        where = f"{change.address:#x}, {count_of(change.size, 'byte')} in {change.module}"
        lines.append(f"  {printable(where)}: {_WORDS[change.kind]}")
    return lines + _format_rest(len(changes), limit)


def _format_rest(n_all: int, limit: int | None) -> list[str]:
    """Return a line that tells how many are not shown."""
    return [f"  and {n_all - limit} more (-v)"] if limit is not None and n_all > limit else []
