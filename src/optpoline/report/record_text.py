# SPDX-License-Identifier: Apache-2.0
"""What ``optpoline record`` says at its end."""

from __future__ import annotations

from optpoline.controller.summary import DetachResult
from optpoline.controller.tracing import RecordTotals
from optpoline.report.session_text import count_of, format_detach
from optpoline.report.table import printable

__all__ = ["format_record"]


def format_record(path: str, totals: RecordTotals, detach: DetachResult) -> list[str]:
    """Return what was recorded, and how letting go went."""
    lines = [
        f"{printable(path)}: {totals.n_branches:,} branches of"
        f" {count_of(totals.n_sites, 'site')} in {count_of(totals.n_bursts, 'burst')}"
        f" of {totals.seconds:.3f} s together"
    ]
    n_all = max(1, totals.n_branches + totals.n_dropped + totals.n_unknown)
    if not totals.n_sites:
        lines.append("note: nothing was hot while the targets were learned")
    if totals.n_dropped:
        lines.append(
            f"note: {totals.n_dropped:,} branches ({totals.n_dropped / n_all:.1%}) came faster"
            " than they could be read"
        )
    if totals.n_unknown:
        lines.append(
            f"note: {totals.n_unknown:,} branches ({totals.n_unknown / n_all:.1%}) went to"
            " targets that learning did not meet"
        )
    if totals.is_gone:
        lines.append("note: the program ended meanwhile")
    lines += [f"note: {printable(note)}" for note in totals.notes]
    return lines + format_detach(detach)
