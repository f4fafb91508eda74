# SPDX-License-Identifier: Apache-2.0
"""From counts to decisions: the interface of policies, and what is kept between decisions.

A policy is a pure function of counts; it knows no clock, no block and no
address of ours, so that policies can be replayed against recorded counts and
compared. Whoever asks one (the controller, the simulator) keeps a
``SiteHistory`` for each site::

    view = history.view(window, window_s=..., now_s=...)
    decision = policy.decide(view)
    history = history.after(decision, now_s)

The policies themselves are in ``promote/policies/``; ``policy_named`` there
makes one from its name and settings.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from enum import Enum
from typing import Protocol

from optpoline.learn.counting import SiteCounts
from optpoline.model import SiteKind
from optpoline.promote.schedule import WatchSchedule
from optpoline.promote.tree import PlannedTree

__all__ = ["Action", "Decision", "Policy", "SiteHistory", "SiteView", "WatchSchedule"]

CALM_S = 2.0
"""A site whose tree was found fit for so long, without a break, has lived down one of
its changes. Phases longer than this are followed for ever, shorter ones ever more rarely."""


class Action(Enum):
    """What to do with a site after a window."""

    PROMOTE = "promote"
    """Build a block from the plan: the first one, or a better one."""
    CONFIRM = "confirm"
    """A better plan exists by a narrow margin: look again at once."""
    HOLD = "hold"
    """A better plan exists, but the site has changed too often lately: leave it for now."""
    KEEP = "keep"
    """Leave it as it is."""
    DEMOTE = "demote"
    """Back to the thunk: nothing dominates."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Decision:
    """An action, and what it rests on.

    Attributes:
        action: What to do.
        plan: The tree it is about, where there is one.
        profile: What the policy keeps of the site's counts, handed back to it next
            time; a blend of windows or a sum, as it likes.
        hold_s: How long nothing would be changed anyway; no window is wanted before.
    """

    action: Action
    plan: PlannedTree | None = None
    profile: SiteCounts | None = None
    hold_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteView:
    """All that a policy is told about a site.

    Attributes:
        current: The tree it has, None if it leads to its thunk.
        profile: What the last decision kept, or None.
        window: What the last window counted, over all CPUs.
        window_s: How long that window was, seconds.
        n_confirmed: CONFIRMs before, in a row.
        n_changes: Re-promotions that the site has not lived down yet.
        since_change_s: Seconds since it was promoted, first or anew.
        kind: What the site's instruction does.
        hotter_ratio: Share of all branches of the program that hotter sites take, 0..1.
        max_guards: Guards that the program's source allows at most, 0 for any number.
        is_plain: Whether a miss is a plain indirect branch, not a retpoline.
    """

    current: PlannedTree | None
    profile: SiteCounts | None
    window: SiteCounts
    window_s: float
    n_confirmed: int = 0
    n_changes: int = 0
    since_change_s: float = 0.0
    kind: SiteKind = SiteKind.CALL
    hotter_ratio: float = 0.0
    max_guards: int = 0
    is_plain: bool = False

    def limit_guards(self, n_guards: int) -> int:
        """Return how many guards a tree may have by a policy's limit and the source's."""
        return min(n_guards, self.max_guards) if self.max_guards else n_guards


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteHistory:
    """What is kept of a site between decisions.

    Attributes:
        current: The tree it has, None if it leads to its thunk.
        profile: What the last decision kept.
        n_confirmed: CONFIRMs in a row.
        n_changes: Re-promotions not lived down.
        changed_s: When it was promoted, first or anew; the caller's clock.
        calm_since_s: Since when its tree has been found fit, or one change was lived down.
    """

    current: PlannedTree | None = None
    profile: SiteCounts | None = None
    n_confirmed: int = 0
    n_changes: int = 0
    changed_s: float = 0.0
    calm_since_s: float = 0.0

    def view(
        self,
        window: SiteCounts,
        *,
        window_s: float,
        now_s: float,
        kind: SiteKind = SiteKind.CALL,
        hotter_ratio: float = 0.0,
        max_guards: int = 0,
        is_plain: bool = False,
    ) -> SiteView:
        """Return what a policy is told about the site after a window."""
        return SiteView(
            current=self.current,
            profile=self.profile,
            window=window,
            window_s=window_s,
            n_confirmed=self.n_confirmed,
            n_changes=self.n_changes,
            since_change_s=max(0.0, now_s - self.changed_s),
            kind=kind,
            hotter_ratio=hotter_ratio,
            max_guards=max_guards,
            is_plain=is_plain,
        )

    def after(self, decision: Decision, now_s: float) -> SiteHistory:
        """Return the history once a decision was carried out.

        Who cannot carry out a promotion (no room) keeps its history with the new profile.
        """
        kept = replace(self, profile=decision.profile, n_confirmed=0)
        match decision.action:
            case Action.PROMOTE if decision.plan is not None:
                return SiteHistory(
                    current=decision.plan,
                    profile=decision.profile,
                    n_changes=self.n_changes + (self.current is not None),
                    changed_s=now_s,
                    calm_since_s=now_s,
                )
            case Action.CONFIRM:
                return replace(kept, n_confirmed=self.n_confirmed + 1, calm_since_s=now_s)
            case Action.HOLD:
                return replace(kept, calm_since_s=now_s)
            case Action.DEMOTE:
                return SiteHistory(n_changes=self.n_changes, changed_s=now_s, calm_since_s=now_s)
            case _:
                n_lived_down = int((now_s - self.calm_since_s) / CALM_S)
                return replace(
                    kept,
                    n_changes=max(0, self.n_changes - n_lived_down),
                    calm_since_s=self.calm_since_s + n_lived_down * CALM_S,
                )


class Policy(Protocol):
    """When to promote, re-promote and demote; implemented in ``promote/policies/``."""

    @property
    def name(self) -> str:
        """What it is called on the command line."""

    @property
    def schedule(self) -> WatchSchedule:
        """When it wants to be shown windows, and how long they are."""

    def decide(self, view: SiteView) -> Decision:
        """Decide about a site after a window.

        A site without a tree is promoted or kept; only one that has a tree is
        confirmed, held or demoted.
        """

    def is_surprising(self, view: SiteView) -> bool:
        """Tell whether the window alone shows that a promoted site's tree is wrong.

        Asked after a part of a window; if so the rest of it is counted at once.
        """
