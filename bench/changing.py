# SPDX-License-Identifier: Apache-2.0
"""What it costs to change a promoted site: swapped, and with its fast path switched off.

Changes are asked for, not waited for: between two trees of all the targets, so that none is
much better, in the program with phases. All but the times is told by the program and the arena.
"""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

import optpoline
from bench import statistics
from bench.errors import BenchError
from bench.figures import Figure
from bench.programs.phases import Phases, Snap
from optpoline.controller.arguments import CHANGES, Change
from optpoline.promote.cost import CostModel
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.policy import Action, Decision, SiteView
from optpoline.promote.schedule import WatchSchedule
from optpoline.promote.tree import PlannedTree, balance_tree, plan_tree

__all__ = ["measure_changes"]

_CHANGES = 20
_QUIET_S = 0.6
"""Between changes: a swapped site is settled by then."""
_RELINK_AFTER_S = 0.2
_EVERY_S = 0.1
_AFTER_S = 0.2
_CHANGED_S = 10.0
_NAMES: dict[Change, str] = {"swap": "swapped", "switch-off": "fast path off meanwhile"}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Instant:
    """How things were at one time.

    Attributes:
        at_ns: CLOCK_MONOTONIC.
        snap: How far the program was.
        free_size: Bytes of code that could be handed out.
    """

    at_ns: int
    snap: Snap
    free_size: int


class _Turning:
    """A policy that changes the tree when it is told to (``promote.policy.Policy``)."""

    name = "turning"

    def __init__(self, on_decision: Callable[[], None]) -> None:
        """Change nothing; call ``on_decision`` before each change."""
        self.is_wanted = False
        self._on_decision = on_decision
        self._first = AdaptivePolicy()

    @property
    def schedule(self) -> WatchSchedule:
        """As the default policy's."""
        return self._first.schedule

    def decide(self, view: SiteView) -> Decision:
        """Take the other tree of all targets, once for each time that it is wanted."""
        counts = view.window.counts
        if view.current is None:
            return self._first.decide(view)
        if not self.is_wanted or not counts:
            return Decision(action=Action.KEEP, profile=view.window)
        plan = plan_tree(counts, 0, CostModel())
        if plan.tree == view.current.tree:
            tree = balance_tree(counts)
            plan = PlannedTree(tree=tree, targets=plan.targets, hit_ratio=1.0, cycles=plan.cycles)
        self.is_wanted = False
        self._on_decision()
        return Decision(action=Action.PROMOTE, plan=plan, profile=view.window)

    def is_surprising(self, view: SiteView) -> bool:
        """Nothing is: changes come when they are wanted."""
        return False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cost:
    """What one change cost.

    Attributes:
        ms: From the decision to the new tree at work.
        speed_ratio: Branches for CPU time until then, of those after.
        lost_ms: What the program would have saved if it had been as fast as after.
        taken_size: Bytes of code that were taken for it.
        is_swap: Whether it was a swap.
    """

    ms: float
    speed_ratio: float
    lost_ms: float
    taken_size: int
    is_swap: bool


class _Changed:
    """A program that is promoted, and whose only site is changed on request.

    Args:
        program: The program.
        change: The way.
    """

    def __init__(self, program: Phases, change: Change) -> None:
        """Attach."""
        self._program = program
        self._policy = _Turning(self._note_decision)
        self._instants: list[_Instant] = []
        """Of the decision, and of when the new tree was at work."""
        self._is_swap = False
        self._is_over = threading.Event()
        config = optpoline.Config(
            change=change,
            policy=self._policy,
            sample_every_s=_EVERY_S,
            sample_every_max_s=_EVERY_S,
            relink_after_s=_RELINK_AFTER_S,
        )
        self.session = optpoline.attach(program.pid, config=config, on_event=self._hear)

    def __enter__(self) -> _Changed:
        """Promote the site."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(self.session)
            self.session.learn()
            if not self.session.promote():
                raise BenchError("the program with phases: nothing was promoted")
            stack.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Let the program go."""
        self.session.__exit__(kind, error, trace)

    def _now(self) -> _Instant:
        """Look at the program and at the arena."""
        snap = self._program.snap()
        free_size = sum(arena.free_code_size for arena in self.session.target.arenas)
        return _Instant(at_ns=time.monotonic_ns(), snap=snap, free_size=free_size)

    def _note_decision(self) -> None:
        """Note when a change was decided on."""
        self._instants = [self._now()]

    def _hear(self, event: optpoline.Event) -> None:
        """Note when the new tree is at work."""
        if event.kind is optpoline.EventKind.RELEARNED and len(self._instants) == 1:
            at_ns = time.monotonic_ns()
            self._instants.append(replace(self._now(), at_ns=at_ns))
            self._is_swap = "swapped" in event.message
            self._is_over.set()

    def change(self) -> _Cost:
        """Change it once, when it has been quiet for a while."""
        self.session.watch(_QUIET_S)
        self._instants.clear()
        self._is_over.clear()
        self._policy.is_wanted = True
        self.session.watch(_CHANGED_S, self._is_over)
        if not self._is_over.is_set():
            raise BenchError(f"the site was not changed within {_CHANGED_S:.0f} s")
        decided, working = self._instants
        time.sleep(_AFTER_S)
        after = self._program.snap()
        time.sleep(_AFTER_S)
        speed = (self._program.snap() - after).speed
        whole = after - decided.snap
        return _Cost(
            ms=(working.at_ns - decided.at_ns) / 1e6,
            speed_ratio=_speed(working.snap - decided.snap) / speed,
            lost_ms=(whole.cpu_ns / 1e3 - whole.calls / speed) / 1e3,
            taken_size=decided.free_size - working.free_size,
            is_swap=self._is_swap,
        )


def _speed(done: Snap) -> float:
    """Return calls per microsecond; a program tells its CPU time only now and then."""
    return done.speed if done.cpu_ns else math.nan


def measure_changes(executable: Path) -> Iterator[Figure]:
    """Compare the two ways to change a site, each in a process of its own."""
    for change in CHANGES:
        with contextlib.ExitStack() as stack:
            program = stack.enter_context(Phases(executable, start="many"))
            changed = stack.enter_context(_Changed(program, change))
            costs = [changed.change() for _ in range(_CHANGES)]
        yield from _figures(change, costs)


def _figures(change: Change, costs: Sequence[_Cost]) -> Iterator[Figure]:
    """Say what changes of one way cost."""
    name = f"site changed, {_NAMES[change]}"
    rows = [
        ("decision to the new tree at work", "ms", [cost.ms for cost in costs]),
        ("program's time lost to it", "ms", [cost.lost_ms for cost in costs]),
        ("code memory taken", "B", [float(cost.taken_size) for cost in costs]),
    ]
    if change == "switch-off":
        ratios = [cost.speed_ratio for cost in costs]
        rows.append(("branches meanwhile, of those after", "of it", ratios))
    for what, unit, values in rows:
        value = statistics.median(values).value
        yield Figure(name=f"{name}: {what}", value=value, unit=unit, bar=None)
    if change == "switch-off":
        n_swaps = float(sum(cost.is_swap for cost in costs))
        what = f"of {len(costs)}, swapped after all"
        yield Figure(name=f"{name}: {what}", value=n_swaps, unit="", bar=None)
