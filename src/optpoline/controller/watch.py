# SPDX-License-Identifier: Apache-2.0
"""Watch a program: keep up with it until time is over, told to stop, or it is gone.

A watch takes step after step. A step does what is due for linked sites (``upkeep``), gives
sites that have become hot a first window, and now and then looks for modules that were loaded
since. What cannot be done for the moment is noted, and tried again when it is due again.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

from optpoline.controller.config import Config
from optpoline.controller.counting_blocks import MIN_FREE_CODE_SIZE
from optpoline.controller.events import EventKind
from optpoline.controller.first_learning import FirstLearning
from optpoline.controller.first_promotion import FirstPromotion
from optpoline.controller.inventory import Inventory
from optpoline.controller.lifeline import Lifeline
from optpoline.controller.settling import OFF_PAUSE_S
from optpoline.controller.standing import Standing
from optpoline.controller.summary import SessionState
from optpoline.controller.target import Target
from optpoline.controller.upkeep import Upkeep
from optpoline.controller.wording import count_of
from optpoline.errors import (
    ArenaError,
    PermissionDenied,
    ProcessGone,
    StopTimeout,
    TargetFault,
    UnsupportedTarget,
)

__all__ = ["Watch"]

_MORE_S = 0.1
"""How much longer than asked for a watch may take to end a change that is under way: a grace
period takes 5 to 50 ms where the first look tells all."""

_PASSING = (ArenaError, PermissionDenied, StopTimeout, TargetFault, UnsupportedTarget)
"""Errors that say no more than that something cannot be done for the moment."""


class Watch:
    """Watches the target of one session, as often as asked to.

    Args:
        config: Settings.
        target: The target.
        lifeline: Of the target.
        standing: Of the session.
        inventory: The session's sites.
        learning: Opens windows over sites on their thunk.
        promotion: Decides on them.
        upkeep: Looks after sites that lead to blocks.
    """

    def __init__(
        self,
        config: Config,
        target: Target,
        *,
        lifeline: Lifeline,
        standing: Standing,
        inventory: Inventory,
        learning: FirstLearning,
        promotion: FirstPromotion,
        upkeep: Upkeep,
    ) -> None:
        """Begin right after modules were looked for."""
        self._config = config
        self._target = target
        self._lifeline = lifeline
        self._standing = standing
        self._inventory = inventory
        self._learning = learning
        self._promotion = promotion
        self._upkeep = upkeep
        self._next_maps_s = time.monotonic() + config.maps_every_s

    def run(self, seconds: float | None, stop: threading.Event | None) -> SessionState:
        """Watch for a while.

        Args:
            seconds: How long; None for no limit.
            stop: Ends the watch when set.

        Returns:
            WATCHING if it ended because of ``seconds`` or ``stop``, else EXITED or EXECED.
        """
        standing = self._standing
        standing.state = SessionState.WATCHING
        end_s = None if seconds is None else time.monotonic() + seconds
        try:
            while standing.state is SessionState.WATCHING and not _is_set(stop):
                now_s = time.monotonic()
                left_s = math.inf if end_s is None else end_s - now_s
                is_any_off = self._upkeep.is_any_off
                if left_s <= (-_MORE_S if is_any_off else 0.0):
                    break
                pause_s = OFF_PAUSE_S if is_any_off else self._upkeep.pause_s(now_s)
                self._once(pause_s if left_s <= 0.0 else min(pause_s, left_s), stop)
        finally:
            self._upkeep.end()
        return standing.state

    def _once(self, pause_s: float, stop: threading.Event | None) -> None:
        """Wait, do what is due, and notice the end of the program."""
        try:
            self._lifeline.sleep(pause_s)
            self.step(time.monotonic(), stop)
        except ProcessGone:
            end = self._lifeline.find_end(self._target)
            self._standing.state = SessionState.WATCHING if end is None else end
            if end is SessionState.EXECED:
                self._tell_execed()
            elif end is SessionState.EXITED:
                self._standing.tell(EventKind.EXITED, f"process {self._target.pid} exited")
        except _PASSING as error:
            # For the moment it cannot be done; every site leads somewhere right meanwhile.
            self._standing.state = SessionState.WATCHING
            self._standing.note_once(str(error))

    def step(self, now_s: float, stop: threading.Event | None = None) -> None:
        """Do what is due.

        Args:
            now_s: CLOCK_MONOTONIC, seconds.
            stop: Ends a learning window early when set.
        """
        self._upkeep.step(now_s)
        if self._upkeep.is_any_off:
            return  # and let nothing that takes long come in between
        self._rediscover(time.monotonic(), stop)
        if now_s >= self._next_maps_s:
            self._next_maps_s = now_s + self._config.maps_every_s
            self._note_used_up()
            self._check_maps(stop)

    def _note_used_up(self) -> None:
        """Say once that an arena has no room for further changes."""
        for arena in self._target.arenas:
            note = (
                f"the arena at {arena.addr:#x} is used up: its sites keep working as they are, "
                "changes of the workload are followed no more; attach anew for an empty one"
            )
            if arena.free_code_size < MIN_FREE_CODE_SIZE:
                self._standing.note_once(note)

    def _rediscover(self, now_s: float, stop: threading.Event | None) -> None:
        """Learn the sites anew that time is spent for in thunks."""
        found = self._upkeep.find_hot(now_s)
        if not found:
            return
        relearn_s = self._config.relearn_s
        self._learn_and_promote(lambda: self._learning.learn_hot(found, relearn_s, stop))

    def _learn_and_promote(self, learn: Callable[[], None]) -> None:
        """Learn while watching, and decide on it."""
        try:
            learn()
        except _PASSING:
            # Sites may still count: nobody else comes back to them, nor to what was learned.
            self._promotion.promote()
            raise
        self._promotion.promote()
        self._standing.state = SessionState.WATCHING

    def _check_maps(self, stop: threading.Event | None) -> None:
        """Notice exec and new modules."""
        self._target.read_maps()
        if not self._inventory.is_code_new():
            return
        if not self._target.has_arena():
            self._standing.state = SessionState.EXECED
            self._tell_execed()
            return
        fresh = self._inventory.take_in()
        if fresh:
            names = ", ".join(sorted({record.site.module for record in fresh}))
            message = f"{names}: {count_of(len(fresh), 'site')}"
            self._standing.tell(EventKind.MODULE_ADDED, message)
            learn_s = self._config.first_window_s(is_hot_only=False)
            self._learn_and_promote(
                lambda: self._learning.learn(fresh, learn_s, stop, in_turn=True)
            )

    def _tell_execed(self) -> None:
        """Say that the program is another one now."""
        self._standing.tell(EventKind.EXECED, f"process {self._target.pid} replaced its program")


def _is_set(stop: threading.Event | None) -> bool:
    """Tell whether somebody has asked for the end."""
    return stop is not None and stop.is_set()
