# SPDX-License-Identifier: Apache-2.0
"""Commit a transaction: many stores to a running program's text, as if they were one.

The promise: once any thread has executed a new site of a transaction, no thread executes
an old one; and no thread is between ``optpoline_read_begin`` and ``optpoline_read_end``
meanwhile. So all stores are made in one stop in which *every* thread stands. Threads that
sleep in the kernel run nothing, but one that woke between the first store and the last
would meet both sides; so sleepers are stopped as well, where they will not notice, and
where one sleeps that would, the transaction waits.

1. Plan, from what memory holds.
2. Stop everybody.
3. Look: nobody sleeps on, nobody is in a bracket, nobody's program counter is inside an
   instruction that changes (no boundary ever moves, so nobody's can be). Else let all go,
   wait a little longer than before, and begin again.
4. Make the stores, or none. Where memory is not as planned any more, somebody else changed
   it since: begin again.

A controller that is killed in 4 has made the first stores and not the last: each is whole,
and what is half done can be told and finished (``changes.py``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from optpoline.controller.arguments import validate_setting
from optpoline.controller.target import Target
from optpoline.discover.readers import READER_COUNT_SIZE
from optpoline.errors import SiteChanged, TargetFault, TransactionTimeout
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import Poke, find_entered, poke_all
from optpoline.process.stop import Stop, Wake

__all__ = ["DEFAULT_TIMEOUT_S", "Plan", "commit"]

DEFAULT_TIMEOUT_S = 2.0
"""How long to wait for readers and for sleepers that must not be interrupted."""

_FIRST_PAUSE_S = 0.0005
_MAX_PAUSE_S = 0.05
_PLAN_AGAIN_S = 0.008
"""After a pause of so long a plan is made anew: modules may have been loaded."""

_PATIENCE_S = 0.1
"""After that a wait's timeout may begin again: its call is waited for in vain."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What a commit is to do.

    Attributes:
        pokes: The stores, in their order.
        readers_offsets: Where each thread's counts of open brackets are, from its thread
            pointer; one for each module that brackets anything.
    """

    pokes: tuple[Poke, ...]
    readers_offsets: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Obstacle:
    """Why it could not be done this time."""

    reason: str
    tids: tuple[int, ...] = ()
    is_plan_old: bool = False


def commit(target: Target, make_plan: Callable[[], Plan], *, timeout_s: float) -> int:
    """Make all stores of a plan in one stop.

    Target state: running; every thread stands while the stores are made.
    On error: nothing was changed.

    Args:
        target: The program.
        make_plan: Makes the plan anew for each try.
        timeout_s: How long to try.

    Returns:
        How many stores were made; 0 if all was so already.

    Raises:
        UsageError: if ``timeout_s`` is no length of time.
        TransactionTimeout: if a thread was in the way each time.
        SiteChanged: if a site holds somebody else's bytes.
        StopTimeout: if the threads do not stop.
        ProcessGone: if the target is.
        PermissionDenied: if a thread cannot be traced.
    """
    validate_setting("timeout_s", timeout_s)
    begin_s = time.monotonic()
    pause_s = _FIRST_PAUSE_S
    plan: Plan | None = None
    while True:
        try:
            plan = plan or make_plan()
            waited_s = time.monotonic() - begin_s
            may_delay = waited_s >= min(_PATIENCE_S, timeout_s / 2)
            obstacle = _try(target, plan, may_delay=may_delay) if plan.pokes else None
            if obstacle is None:
                return len(plan.pokes)
        except TargetFault:
            # Another plan shows whether its module was unloaded, or cannot be read at all.
            obstacle = _Obstacle(reason="modules come and go", is_plan_old=True)
        if time.monotonic() - begin_s >= timeout_s:
            raise TransactionTimeout(timeout_s, obstacle.reason, obstacle.tids, pid=target.pid)
        time.sleep(min(pause_s, max(0.0, begin_s + timeout_s - time.monotonic())))
        if obstacle.is_plan_old or pause_s >= _PLAN_AGAIN_S:
            plan = None
        pause_s = min(2 * pause_s, _MAX_PAUSE_S)


def _try(target: Target, plan: Plan, *, may_delay: bool) -> _Obstacle | None:
    """Try once; say what was in the way, or None if it is done."""
    if not target.may_wake_all(may_delay=may_delay):
        return _Obstacle(reason="a thread sleeps in a system call that must not be interrupted")
    sites = sorted((poke.entry for poke in plan.pokes), key=lambda entry: entry.addr)
    with target.stop(Wake.ALL) as stop:
        obstacle = _look(target, stop, plan, sites)
        if obstacle is None:
            try:
                poke_all(target.memory, plan.pokes)
            except SiteChanged:
                # Another plan shows whether it is another transaction's work or not ours.
                reason = "others change the same keys or calls"
                return _Obstacle(reason=reason, is_plan_old=True)
    return obstacle


def _look(
    target: Target, stop: Stop, plan: Plan, sites: Sequence[JournalEntry]
) -> _Obstacle | None:
    """Say who is in the way of the stores."""
    if stop.asleep:
        reason = f"{_threads(stop.asleep)} in a system call that must not be interrupted"
        return _Obstacle(reason=reason, tids=stop.asleep)
    for thread in stop.stopped:
        if find_entered(sites, thread.pc) is not None:
            reason = "a thread stands inside an instruction that is changed"
            return _Obstacle(reason=reason, tids=(thread.tid,))
    reading = tuple(
        thread.tid
        for thread in stop.stopped
        if any(_is_reading(target, thread.thread_pointer + off) for off in plan.readers_offsets)
    )
    if reading:
        reason = f"{_threads(reading)} between optpoline_read_begin and optpoline_read_end"
        return _Obstacle(reason=reason, tids=reading)
    return None


def _is_reading(target: Target, addr: int) -> bool:
    """Tell whether a thread's count of open brackets is not 0."""
    try:
        return any(target.memory.read(addr, READER_COUNT_SIZE))
    except TargetFault:
        return False  # a thread without thread-local storage: a bracket would have killed it


def _threads(tids: Sequence[int]) -> str:
    """Name threads as the subject of a sentence.

    >>> _threads((7,)), _threads((7, 8))
    ('thread 7 is', 'threads 7, 8 are')
    """
    names = ", ".join(map(str, tids))
    return f"threads {names} are" if len(tids) > 1 else f"thread {names} is"
