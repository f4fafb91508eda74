# SPDX-License-Identifier: Apache-2.0
"""Change many sites in as few stops as their greatest length allows.

Sites whose displacement crosses a cache line, or whose opcode changes (plain sites), come
last, in stops of all threads, and only if nobody sleeps in a call that must not be
interrupted, and nobody stands inside one of them; else they are left for another time. Who
sleeps is looked at first, without a stop: where it is known to be in vain none is made.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace

from optpoline.controller.target import Target
from optpoline.model import Addr
from optpoline.patch.text import Poke, PokeResult, find_entered, needs_all_stopped, poke_batch
from optpoline.process.stop import Stop, Wake

__all__ = ["MAX_TRIES", "TRY_EVERY_S", "Poked", "poke_in_stops", "poke_patiently"]

MAX_TRIES = 50
"""Times that sites are tried for which all threads have to stand, while one sleeps in a call
that must not be interrupted: it may soon return."""

TRY_EVERY_S = 0.01


@dataclass(frozen=True, slots=True, kw_only=True)
class Poked:
    """What became of all pokes.

    Attributes:
        done: Written, or found written already.
        foreign: Left, because their site held another patcher's bytes.
        reloaded: Left, because their module was loaded anew.
        left: Not tried: all threads had to stand for them, and one slept that must not be
            woken, or stood inside.
    """

    done: tuple[Poke, ...]
    foreign: tuple[Poke, ...]
    reloaded: tuple[Poke, ...]
    left: tuple[Poke, ...]


def poke_in_stops(target: Target, pokes: Sequence[Poke], *, may_delay: bool = False) -> Poked:
    """Do all pokes, a batch in each stop.

    Args:
        target: The process.
        pokes: The hottest sites first: they are changed first.
        may_delay: Whether timeouts of waits may begin again where it takes that.

    Raises:
        SiteChanged: if a site does not read back as written; what was done stays.
        StopTimeout: if the threads could not be stopped; likewise.
        ProcessGone: if the target is.
    """
    crossing = [poke for poke in pokes if needs_all_stopped(poke.entry)]
    easy = [poke for poke in pokes if not needs_all_stopped(poke.entry)]
    results: list[PokeResult] = []
    while easy:
        n = target.pace.batch_size()
        batch, easy = easy[:n], easy[n:]
        with target.stop() as stop:
            results.append(poke_batch(target.memory, batch))
        target.pace.note(len(batch), stop.duration_ns)
    left: tuple[Poke, ...] = ()
    while crossing:
        # Else a stop would only find the sleeper.
        if not target.may_wake_all(may_delay=may_delay):
            left += tuple(crossing)
            break
        n = target.pace.batch_size()
        batch, crossing = crossing[:n], crossing[n:]
        with target.stop(Wake.ALL) as stop:
            if stop.asleep:
                left += (*batch, *crossing)
                crossing = []
            else:
                entered = _find_entered(batch, stop)
                free = [poke for poke in batch if poke.entry.addr not in entered]
                results.append(poke_batch(target.memory, free))
                left += tuple(poke for poke in batch if poke.entry.addr in entered)
        if not stop.asleep:
            target.pace.note(len(batch), stop.duration_ns)
    return Poked(
        done=tuple(poke for result in results for poke in result.done),
        foreign=tuple(poke for result in results for poke in result.foreign),
        reloaded=tuple(poke for result in results for poke in result.reloaded),
        left=left,
    )


def _find_entered(pokes: Sequence[Poke], stop: Stop) -> frozenset[Addr]:
    """Return the sites that a thread stands inside.

    No boundary ever moves, so nobody can be; should anybody be, he goes on first.
    """
    sites = sorted((poke.entry for poke in pokes), key=lambda entry: entry.addr)
    found = (find_entered(sites, thread.pc) for thread in stop.stopped)
    return frozenset(site.addr for site in found if site is not None)


def poke_patiently(target: Target, pokes: Sequence[Poke]) -> Poked:
    """Do all pokes, trying again for a while what had to be left.

    At last rather a timeout of a wait ends late than a site stays as it is.

    Raises:
        SiteChanged, StopTimeout, ProcessGone: as ``poke_in_stops``.
    """
    poked = poke_in_stops(target, pokes)
    for tries_left in reversed(range(MAX_TRIES)):
        if not poked.left:
            break
        time.sleep(TRY_EVERY_S)
        more = poke_in_stops(target, poked.left, may_delay=not tries_left)
        poked = replace(
            poked,
            done=poked.done + more.done,
            foreign=poked.foreign + more.foreign,
            reloaded=poked.reloaded + more.reloaded,
            left=more.left,
        )
    return poked
