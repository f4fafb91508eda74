# SPDX-License-Identifier: Apache-2.0
"""Say why a learning window ended without a promotion, as far as that can be told.

Who waits for a promotion wants to know whether to wait on: a stopped program and one
whose sites are cold look alike from outside.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.controller.wording import count_of
from optpoline.patch.text import needs_all_stopped
from optpoline.process.procfs import read_status
from optpoline.promote.cost import CostModel

__all__ = ["explain_not_promoted", "find_unlinked"]

_STOPPED = "T"
"""Stopped by a signal, as ps(1) has it."""


def find_unlinked(tried: Iterable[SiteRecord], learned: Sequence[SiteRecord]) -> list[SiteRecord]:
    """Return the sites that were to be learned, and could not be led to their blocks.

    Args:
        tried: The sites for which there has been a block at any time.
        learned: Those that the window was about.
    """
    addrs = {record.site.addr for record in learned}
    return [
        record
        for record in tried
        if record.state is SiteState.BASELINE
        and record.home is None
        and record.counts is None
        and record.site.addr not in addrs
        and needs_all_stopped(record.entry)
    ]


def explain_not_promoted(
    pid: int,
    learned: Sequence[SiteRecord],
    unlinked: Sequence[SiteRecord] = (),
    *,
    promote_plain: bool = False,
) -> str:
    """Return the reason as the rest of a sentence.

    Args:
        pid: The program.
        learned: The sites that the window was about.
        unlinked: Those that it should have been about as well (``find_unlinked``).
        promote_plain: See ``Config``.

    Raises:
        ProcessGone: if the program is.
    """
    left = [r for r in learned if r.state is SiteState.PROMOTED and r.home is None]
    if not left and not any(record.counts is not None for record in learned):
        left = list(unlinked)
    if left:
        sites = count_of(len(left), "site")
        return (
            f"{sites} can be changed only while all threads stand, and one sleeps in a call that "
            "must not be interrupted"
        )
    if not learned:
        return "no site was learned from"
    reached = [r for r in learned if r.counted is not None and r.counted.total]
    if not reached:
        if read_status(pid).state == _STOPPED:
            return f"the process is stopped (SIGCONT lets it run: kill -CONT {pid})"
        return "no site was reached: the program sleeps, or is busy elsewhere"
    usable = [record for record in reached if record.state is not SiteState.REFUSED]
    if not usable:
        return "the sites that were reached cannot be promoted"
    if not promote_plain and all(record.site.is_undeclared_plain for record in usable):
        return "plain branches that no source declares are promoted with --promote-plain only"
    rate_hz = max(record.rate_hz or 0.0 for record in usable)
    model = CostModel()
    if not model.worthwhile(saved_cycles=model.retpoline_cycles, rate_hz=rate_hz):
        return f"no site is hot: the busiest branches {rate_hz:.0f} times a second"
    if all(record.far_targets for record in usable):
        return "the targets of its busy sites are more than 2 GiB away, beyond any direct branch"
    return "no target of a busy site was met often enough to be worth a guard"
