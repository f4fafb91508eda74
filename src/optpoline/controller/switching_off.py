# SPDX-License-Identifier: Apache-2.0
"""Switch a site's fast path off while it is changed, and on again.

The other way to promote a site anew: ``promotion.promote_again`` writes a second block and
swaps it in by one store. Here no second block is ever live. The head of the site's *home*
block, where its text leads, is the key::

    1. the head becomes a jump to the site's thunk      the fast path is off
    2. a grace period of home's bytes behind the head   nobody is inside
    3. the new tree is written there                    the head still leads to the thunk
    4. the head becomes that of the new tree            the fast path is on

as the kernel's ``dynamic_call`` (E. Cree, 2019) did with a static key and RCU. Steps 2 to 4
are those of ``controller/settling.py``, and are done there. Between 1 and 4 the site's
``SiteRecord.off`` is set, it has no active block, and its branches take the thunk: right, and
slow. They are counted nowhere, for the head jumps to the thunk itself; so nobody may conclude
anything from its miss counter meanwhile, or that the site is not promoted.
"""

from __future__ import annotations

from optpoline.controller.deciding import history_of, keep_history
from optpoline.controller.promotion import plan_block
from optpoline.controller.records import SiteRecord, SwitchedOff
from optpoline.patch.blocks import Block, make_fit, point_back, redirect
from optpoline.promote.policy import Decision

__all__ = ["put_back", "switch_off", "switch_on"]

NOT_AT_HOME = "an earlier block of the site still leads on to another"
NO_ROOM = "the site's block has no room for the new tree"


def switch_off(record: SiteRecord, decision: Decision) -> str | None:
    """Step 1: lead a promoted site to its thunk, to carry out a decision where its block is.

    Target state: running; one aligned store.

    Returns:
        Why it cannot be changed in its place, or None if it will be. The room that takes is
        taken by then.
    """
    home = record.home
    if home is None or home is not record.active or record.counting is not None:
        return NOT_AT_HOME
    plan = decision.plan
    coming = None if plan is None else make_fit(home, plan_block(record, plan, None))
    if coming is None:
        return NO_ROOM
    redirect(home, record.thunk_addr)
    record.active = None
    record.off = SwitchedOff(coming=coming, decision=decision)
    return None


def switch_on(record: SiteRecord, home: Block, now_s: float) -> None:
    """Step 4: let a site take its fast path again, which is the new one.

    Args:
        record: The site.
        home: Its home as it was rewritten.
        now_s: CLOCK_MONOTONIC, seconds.

    Target state: running; one aligned store.
    """
    assert record.off is not None
    point_back(home)
    record.home = record.active = home
    keep_history(record, history_of(record).after(record.off.decision, now_s))
    record.off = None
    record.n_grown = 0
    record.n_relearned += 1


def put_back(record: SiteRecord) -> Decision:
    """Undo step 1, before step 3: the old tree goes on; return what was not carried out.

    Target state: running; one aligned store.
    """
    assert record.home is not None
    assert record.off is not None
    decision = record.off.decision
    point_back(record.home)
    record.active, record.off = record.home, None
    return decision
