# SPDX-License-Identifier: Apache-2.0
"""A session in words: the line that is updated while it runs, and the summary at its end."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.controller.summary import (
    BranchSource,
    DetachOutcome,
    DetachResult,
    LeftBehind,
    ReclaimSummary,
    SessionState,
    SiteState,
    SiteSummary,
    Summary,
    TargetShare,
)
from optpoline.controller.wording import count_of
from optpoline.report.demangle import readable_name, shorten_middle
from optpoline.report.table import Colour, Column, Style, format_table, printable

__all__ = [
    "count_of",
    "format_detach",
    "format_left_behind",
    "format_progress",
    "format_ratio",
    "format_summary",
]

MAX_SITES_SHOWN = 10
"""Rows of the table of hottest sites."""

MAX_TARGETS_SHOWN = 3
"""Targets named per site in that table."""

MAX_HOLDERS_SHOWN = 4
"""Threads named that keep memory from being reused."""

_STATE_WORDS = {
    SessionState.ATTACHED: "attached",
    SessionState.LEARNING: "learning",
    SessionState.PROMOTED: "promoted",
    SessionState.WATCHING: "watching",
    SessionState.RESTORED: "restored: every byte is as it was before",
    SessionState.PARTLY_RESTORED: "not all restored: some sites could not be, see the notes",
    SessionState.LEFT: "left: the promotions keep working",
    SessionState.EXITED: "the program exited",
    SessionState.EXECED: "the program replaced itself (exec)",
}


def format_ratio(ratio: float | None) -> str:
    """Return a share of 0..1 as a percentage, "-" where it is not known.

    >>> format_ratio(0.9934)
    '99.3%'
    """
    return "-" if ratio is None else f"{ratio * 100:.1f}%"


def format_progress(summary: Summary, elapsed_s: float) -> str:
    """Return the one line that is updated on a terminal."""
    parts = [
        f"{elapsed_s:.0f} s",
        summary.state.value,
        count_of(len(summary.sites), "site"),
        f"{summary.promoted} promoted",
        f"hits {format_ratio(summary.hit_rate)}",
        f"stopped {summary.stop_ms_total:.1f} ms",
    ]
    return " · ".join(parts)


def format_summary(summary: Summary, style: Style, *, verbose: bool = False) -> list[str]:
    """Return the lines that end a session: how it went, the hottest sites, the notes."""
    lines = [style.paint(_STATE_WORDS[summary.state], Colour.BOLD)]
    lines.append(
        f"  {summary.promoted} of {count_of(len(summary.sites), 'site')} promoted, hit rate"
        f" {format_ratio(summary.hit_rate)}, {summary.relearned} relearned,"
        f" {summary.learning_s:.1f} s learning"
    )
    lines.append(
        f"  stopped {count_of(summary.stops, 'time')}, longest {summary.stop_ms_max:.2f} ms,"
        f" {summary.stop_ms_total:.2f} ms in all"
    )
    n_by_table = sum(site.source is BranchSource.TABLE for site in summary.sites)
    if n_by_table:
        sites = count_of(n_by_table, "site")
        lines.append(f"  {sites} promoted by what other sites of the same table called")
    lines += _format_reclaim(summary.reclaim, verbose=verbose)
    lines += _format_refusals(summary.sites)
    lines += _format_hottest(summary.sites, style)
    lines += [f"note: {printable(note)}" for note in summary.notes]
    return lines


def format_detach(result: DetachResult) -> list[str]:
    """Return what letting go did, with its notes."""
    restored = count_of(result.restored, "site")
    match result.outcome:
        case DetachOutcome.CLEAN:
            lines = [f"restored {restored}; nothing of optpoline is left"]
        case DetachOutcome.ARENA_LEFT:
            lines = [f"restored {restored}; an arena stays mapped, a thread may still be in it"]
        case DetachOutcome.INCOMPLETE:
            lines = [f"restored {restored}; the others still lead into an arena: try again later"]
        case DetachOutcome.FOREIGN_BYTES:
            foreign = count_of(len(result.foreign), "site")
            lines = [f"restored {restored}; {foreign} left alone, another patcher's bytes there"]
        case DetachOutcome.LEFT:
            lines = ["nothing restored, on request: the promotions keep working"]
        case DetachOutcome.GONE:
            lines = ["the program is gone: nothing to restore"]
    return lines + [f"note: {printable(note)}" for note in result.notes]


def format_left_behind(left: LeftBehind, *, with_addresses: bool) -> list[str]:
    """Return what an earlier controller left in a process."""
    settings = [f"  set: {printable(', '.join(left.settings))}"] if left.settings else []
    if left.is_only_set:
        return [f"process {left.pid}: no site is promoted", *settings]
    alive = "still running" if left.controller_alive else "gone"
    lines = [
        f"process {left.pid}: {count_of(left.sites, 'site')} promoted by controller"
        f" {left.controller_pid} ({alive})",
        f"  {count_of(left.arenas, 'arena')} mapped, {count_of(left.baseline, 'site')} at baseline,"
        f" {left.foreign} with another patcher's bytes",
        *settings,
    ]
    if with_addresses:
        lines += [f"  {address:#x} {state}" for address, state in left.site_addresses]
    return lines


def _format_reclaim(reclaim: ReclaimSummary, *, verbose: bool) -> list[str]:
    """Return what became of replaced blocks: if verbose, and what keeps them from reuse."""
    lines: list[str] = []
    if verbose and reclaim.blocks_retired:
        periods = count_of(reclaim.grace_periods, "grace period")
        lines.append(
            f"  {count_of(reclaim.blocks_retired, 'block')} replaced, {reclaim.blocks_reclaimed}"
            f" reclaimed in {periods}, {reclaim.blocks_reused} written in their place"
        )
    n_kept = reclaim.blocks_retired - reclaim.blocks_reclaimed
    kept = f"  {count_of(n_kept, 'replaced block')} kept"
    if n_kept and reclaim.is_search_refused:
        lines.append(f"{kept}: the program's memory cannot be searched for contexts in them")
    elif n_kept and reclaim.holders:
        lines.append(f"{kept}: {_name_threads(reclaim.holders)} may be inside")
    return lines


def _name_threads(tids: Sequence[int]) -> str:
    """Name threads, the first of many.

    >>> _name_threads((7,)), _name_threads((7, 8)), _name_threads(range(10, 16))
    ('thread 7', 'threads 7 and 8', 'threads 10, 11, 12, 13 and 2 more')
    """
    names = [str(tid) for tid in tids[:MAX_HOLDERS_SHOWN]]
    if len(tids) > MAX_HOLDERS_SHOWN:
        names.append(f"{len(tids) - MAX_HOLDERS_SHOWN} more")
    *first, last = names
    return f"threads {', '.join(first)} and {last}" if first else f"thread {last}"


def _format_refusals(sites: Sequence[SiteSummary]) -> list[str]:
    """Return one line for each reason why sites were left out."""
    reasons: dict[str, int] = {}
    for site in sites:
        if site.refusal is not None:
            reasons[site.refusal] = reasons.get(site.refusal, 0) + 1
    return [f"  {count_of(n, 'site')} left out: {reason}" for reason, n in reasons.items()]


def _format_hottest(sites: Sequence[SiteSummary], style: Style) -> list[str]:
    """Return the table of the sites that branched most, none if nothing was sampled."""
    hot = [site for site in sites if site.rate_hz]
    if not hot:
        return []
    columns = (
        Column(title="branches/s", right=True),
        Column(title="hits", right=True),
        Column(title="kind"),
        Column(title="site", flexible=True),
        Column(title="targets", flexible=True),
    )
    rows = [
        (
            _format_rate(site.rate_hz or 0.0),
            format_ratio(site.hit_rate) if site.state is SiteState.PROMOTED else site.state.value,
            site.kind,
            readable_name(site.function) if site.function else _place(site),
            _format_targets(site.targets),
        )
        for site in hot[:MAX_SITES_SHOWN]
    ]
    lines = ["", *format_table(columns, rows, style)]
    if len(hot) > MAX_SITES_SHOWN:
        more = f"and {len(hot) - MAX_SITES_SHOWN} more that branched (--json lists every one)"
        lines.append(style.paint(more, Colour.DIM))
    return lines


def _format_targets(targets: Sequence[TargetShare]) -> str:
    """Return the hottest targets of a site with their shares."""
    shown: list[str] = []
    for target in targets[:MAX_TARGETS_SHOWN]:
        name = readable_name(target.function) if target.function else f"{target.address:#x}"
        shown.append(f"{shorten_middle(name, 24)} {target.share * 100:.0f}%")
    if len(targets) > MAX_TARGETS_SHOWN:
        shown.append(f"+{len(targets) - MAX_TARGETS_SHOWN}")
    return ", ".join(shown)


def _format_rate(rate_hz: float) -> str:
    """Return a rate with three digits and a unit."""
    for factor, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if rate_hz >= factor:
            return f"{rate_hz / factor:.3g} {unit}"
    return f"{rate_hz:.3g}"


def _place(site: SiteSummary) -> str:
    """Return module and offset of a site without a function."""
    return f"{site.module.rsplit('/', 1)[-1]}+{site.offset:#x}"
