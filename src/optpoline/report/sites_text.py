# SPDX-License-Identifier: Apache-2.0
"""The list of sites of a process or a file, as text."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.controller.summary import ModuleSummary, SiteState, SiteSummary
from optpoline.report.demangle import readable_name, shorten_middle
from optpoline.report.session_text import count_of
from optpoline.report.table import Colour, Column, Style, format_table, printable

__all__ = ["format_no_sites", "format_sites"]

_COLUMNS = (
    Column(title="address", right=True),
    Column(title="kind"),
    Column(title="thunk", flexible=True),
    Column(title="function", flexible=True),
    Column(title="promotable", flexible=True),
)

_TABLE_COLUMN = Column(title="table", flexible=True)
"""The last, where a site of the module is of a table of dynamic calls."""


def format_sites(
    modules: Sequence[ModuleSummary], sites: Sequence[SiteSummary], style: Style
) -> list[str]:
    """Return one block of lines for each module with sites, in the order of ``modules``."""
    lines: list[str] = []
    for module in modules:
        own = sorted(
            (site for site in sites if site.module == module.path), key=lambda site: site.address
        )
        if not own:
            continue
        if lines:
            lines.append("")
        counts = f"{count_of(module.n_sites, 'site')}, {count_of(module.n_thunks, 'thunk')}"
        if module.n_refused:
            counts += f", {module.n_refused} not promotable"
        room = max(16, style.width - len(counts) - 2)
        path = shorten_middle(printable(module.path), room)
        lines.append(style.paint(f"{path}: {counts}", Colour.BOLD))
        if any(site.table is not None for site in own):
            rows = [(*_row(site), printable(site.table or "-")) for site in own]
            lines += format_table((*_COLUMNS, _TABLE_COLUMN), rows, style)
        else:
            lines += format_table(_COLUMNS, [_row(site) for site in own], style)
    return lines


def format_no_sites(modules: Sequence[ModuleSummary], *, is_file: bool = False) -> str:
    """Return what there is instead of sites, as the rest of a sentence.

    Args:
        modules: The process's, or the file alone.
        is_file: Which of the two.
    """
    n_plain = [module.n_plain for module in modules if module.n_plain is not None]
    n_inline = sum(module.n_inline for module in modules)
    what = count_of(sum(module.n_thunks for module in modules), "thunk")
    what += " in it" if is_file else " in its modules"
    if n_inline:
        what += f", {count_of(n_inline, 'inline retpoline')}"
    elif n_plain and sum(n_plain):
        plain = count_of(sum(n_plain), "plain indirect branch", "es")
        what += f", {plain}"
    elif n_plain:
        what += ", no indirect branch at all"
    return what


def _row(site: SiteSummary) -> tuple[str, ...]:
    """Return the cells of one site."""
    return (
        f"{site.address:#x}",
        site.kind,
        site.thunk,
        readable_name(site.function) if site.function else "-",
        _promotable(site),
    )


def _promotable(site: SiteSummary) -> str:
    """Say whether a site can be promoted, or is."""
    if site.refusal is not None:
        return f"no: {site.refusal}"
    return "yes" if site.state is SiteState.BASELINE else f"yes, {site.state.value}"
