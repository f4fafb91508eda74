# SPDX-License-Identifier: Apache-2.0
"""An observer of a model program, which goes on meanwhile; see ``grace_model``.

It sees what ``controller/observer.py`` could, and draws the same conclusions from it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass

from optpoline.patch.grace import Look, ThreadKey
from optpoline.patch.ranges import AddressRanges
from tests.unit.patch.grace_model import Process, Program, Region, RegionKind, Stack, Thread, Word

__all__ = ["ModelObserver"]


@dataclass(frozen=True)
class Scan:
    """A look at one thread.

    Attributes:
        lowest: The place from which on each region of its stacks was scanned.
        held: Addresses in the code that it is at, or may return to.
    """

    lowest: Mapping[Region, int]
    held: frozenset[int]

    def covers(self, stack: Stack) -> bool:
        """Tell whether all of a stack was scanned."""
        return stack.region in self.lowest and stack.place > self.lowest[stack.region]

    def reaches(self, word: Word) -> bool:
        """Tell whether a word was scanned, if nothing has changed since."""
        lowest = self.lowest.get(word.stack.region)
        return self.covers(word.stack) or (word.stack.place == lowest and not word.is_stale)


class ModelObserver:
    """Looks at a program that goes on meanwhile.

    Args:
        program: The program.
        is_switching: Whether it was seen to switch its stacks before.
        is_large: Whether it has too much memory for a search in a stop.
        max_looks: Running threads looked at in one stop, unless the program switches stacks.
    """

    def __init__(
        self,
        program: Program,
        *,
        is_switching: bool = False,
        is_large: bool = False,
        max_looks: int = 100,
    ) -> None:
        """Look at nothing yet."""
        self.script: list[int] = []
        """Steps of the program to come; a 0 lets the observer go on."""
        self.n_steps_while_looking = 0
        self.is_proved = is_switching
        self._program = program
        self._is_suspected = False
        self._is_excused = False
        self._is_large = is_large
        self._max_looks = max_looks
        self._scans: dict[ThreadKey, Scan] = {}
        self._listed: frozenset[ThreadKey] = frozenset()

    def is_switching(self) -> bool:
        """Tell whether the program was ever seen, or is suspected, to switch its stacks."""
        return self.is_proved or self._is_suspected

    def suspect_switching(self) -> None:
        """Look at all in one stop from now on, if that is possible."""
        self._is_suspected = not self._is_excused

    def look(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Look at threads that sleep."""
        held: dict[ThreadKey, frozenset[int]] = {}
        if not known:
            self._scans.clear()
        for process in self._processes():
            for key, thread in tuple(process.threads.items()):
                self._go_on()
                if key not in known:
                    self._look_asleep(process, thread, ranges, held)
        return _as_look(held, self._list(), None)

    def look_stopped(self, ranges: AddressRanges, known: Collection[ThreadKey]) -> Look:
        """Stop threads that run and look at them; sleepers may wake and run meanwhile."""
        held: dict[ThreadKey, frozenset[int]] = {}
        woke: set[ThreadKey] = set()
        pointed_to: set[int] | None = set() if self.is_switching() else None
        if not known:
            self._scans.clear()
        for process in self._processes():
            self._go_on()
            keys = {key for key, thread in process.threads.items() if not thread.is_asleep}
            self._program.frozen |= keys
            n_looks = len(keys) if self.is_switching() else self._max_looks
            for key in sorted(keys - set(known))[:n_looks]:
                self._go_on()
                held[key] = self._look_at(process, process.threads[key], ranges)
            if pointed_to is not None:
                asleep = {k: thread for k, thread in process.threads.items() if k not in keys}
                before = {key: thread.n_switches for key, thread in asleep.items()}
                for thread in asleep.values():
                    self._look_asleep(process, thread, ranges, held)
                pointed_to |= self._search(process, ranges, is_stopped=True)
                woke |= {
                    key
                    for key, one in asleep.items()
                    if key not in held or not _has_slept(process, one, before[key])
                }
            self._program.frozen -= keys
        if pointed_to is not None and self._is_large:
            pointed_to = None
            if self._is_suspected:
                self._is_suspected, self._is_excused = False, True
        # Who woke may have resumed a context that was not found; it may even be gone by now.
        held = {key: addrs for key, addrs in held.items() if key not in woke}
        return _as_look(held, self._list() | woke, pointed_to)

    def search(self, ranges: AddressRanges) -> frozenset[int] | None:
        """Search all memory, that of processes forked meanwhile too."""
        found: set[int] = set()
        searched: list[Process] = []
        while new := [one for one in self._processes() if one not in searched]:
            for process in new:
                searched.append(process)
                found |= self._search(process, ranges, is_stopped=False)
        return frozenset(found)

    def _search(self, process: Process, ranges: AddressRanges, *, is_stopped: bool) -> set[int]:
        """Read one region after another, and each from its lowest stack up."""
        found: set[int] = set()
        for region in process.regions:
            self._go_on()
            for stack in sorted(
                {word.stack for word in process.words if word.stack.region is region},
                key=lambda stack: stack.place,
            ):
                self._go_on()
                words = [word for word in process.words if word.stack == stack]
                if is_stopped:
                    scans = self._scans.values()
                    words = [word for word in words if not any(s.reaches(word) for s in scans)]
                addrs = {self._program.addr_of(word.code) for word in words}
                addrs = {addr for addr in addrs if addr in ranges}
                found |= addrs
                self._judge(stack, addrs)
        return found

    def _judge(self, stack: Stack, addrs: Collection[int]) -> None:
        """Note what saved PCs say of the program, by where they are."""
        living = [scan for key, scan in self._scans.items() if key in self._listed]
        scans = [scan for scan in living if scan.covers(stack)]
        for addr in addrs:
            if any(addr in scan.held for scan in scans):
                continue
            below = any(stack.region in scan.lowest for scan in self._scans.values())
            if below and not scans:
                self.suspect_switching()
            else:
                self.is_proved = True

    def _look_asleep(
        self,
        process: Process,
        thread: Thread,
        ranges: AddressRanges,
        held: dict[ThreadKey, frozenset[int]],
    ) -> None:
        """Look at a thread that may wake; it counts if it slept all the while."""
        before, is_asleep = thread.n_switches, thread.is_asleep
        if is_asleep and process.threads.get(thread.key) is thread:
            addrs = self._look_at(process, thread, ranges)
            if _has_slept(process, thread, before):
                held[thread.key] = addrs
            else:
                self._scans.pop(thread.key, None)

    def _look_at(self, process: Process, thread: Thread, ranges: AddressRanges) -> frozenset[int]:
        """Look at one thread; return where it is inside, or may return."""
        one = thread.continuation
        pc, stack, stacks = one.pc, one.stack, one.stacks
        lowest: dict[Region, int] = {}
        for each in stacks:
            lowest[each.region] = min(each.place, lowest.get(each.region, each.place))
        scan = Scan(lowest, frozenset())
        self._go_on()
        # Contexts on stacks further up, in variables of functions that run, are scanned as well.
        codes = {word.code for word in process.words if scan.reaches(word)}
        codes |= {pc} if pc is not None else set()
        addrs = {self._program.addr_of(code) for code in codes}
        held = frozenset(addr for addr in addrs if addr in ranges)
        self.is_proved |= stack.region.kind is RegionKind.MADE
        own = {r: place for r, place in lowest.items() if r.kind is RegionKind.OWN}
        self._scans[thread.key] = Scan(own, held)
        self._go_on()
        return held

    def _processes(self) -> Iterator[Process]:
        """Return the processes there are now."""
        return iter(tuple(self._program.processes))

    def _list(self) -> frozenset[ThreadKey]:
        """List all threads, as of one moment."""
        self._go_on()
        program = self._program
        program.spare_keys |= program.dead_keys
        program.dead_keys.clear()
        self._listed = frozenset(thread.key for _, thread in program.threads())
        return self._listed

    def _go_on(self) -> None:
        """Let the program go on as the script says."""
        while self.script and (number := self.script.pop(0)):
            self._program.step(number - 1)
            self.n_steps_while_looking += 1


def _has_slept(process: Process, thread: Thread, n_switches: int) -> bool:
    """Tell whether a thread is asleep, and was ever since it had switched so often."""
    is_there = process.threads.get(thread.key) is thread
    return is_there and thread.is_asleep and thread.n_switches == n_switches


def _as_look(
    held: dict[ThreadKey, frozenset[int]],
    threads: frozenset[ThreadKey],
    pointed_to: Collection[int] | None,
) -> Look:
    """Return what was seen."""
    return Look(
        quiescent=frozenset(key for key, addrs in held.items() if not addrs),
        threads=threads,
        holding={key: addrs for key, addrs in held.items() if addrs},
        pointed_to=None if pointed_to is None else frozenset(pointed_to),
    )
