# SPDX-License-Identifier: Apache-2.0
"""A model of a program with blocks, and an observer that sees of it what a real one could.

The program is a set of *continuations*: a PC, and the PCs saved by signal frames below it.
A thread runs one; others are parked in memory (swapcontext out of a handler) until any
thread of the process resumes them. Each saved PC is a word in a *region* of memory. A
region is a thread's stack or other memory, and holds any number of stacks, one above the
other: a coroutine's may lie in an array of a function that has not returned. A register
is not memory: a search never finds a PC that is in one.

The observer lets the program go on between any two things it looks at, by as many steps
as its script says; threads that it has stopped stand still. One step is one number, so
that a failing history shrinks to a short list of numbers.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum

from optpoline.model import Addr
from optpoline.patch.grace import RetiredCode, ThreadKey

__all__ = [
    "BLOCK_SIZE",
    "Continuation",
    "Frame",
    "Process",
    "Program",
    "Region",
    "RegionKind",
    "Stack",
    "State",
    "Thread",
    "Word",
]

BASE = 0x7000_0000
BLOCK_SIZE = 64

Code = tuple[int, int]
"""(block, how often it had been reused): where a PC is; None stands for anywhere else."""


class RegionKind(Enum):
    """What an observer can tell of a region of memory."""

    OWN = "own"
    """A stack as pthreads have it; coroutines with guard pages look the same."""
    MADE = "made"
    """Anything else: who runs there gives the program away as one that switches stacks."""


_OWN = RegionKind.OWN


@dataclass(eq=False)
class Region:
    """A mapping with stacks in it."""

    kind: RegionKind
    number: int


@dataclass(frozen=True)
class Stack:
    """A stack: a part of a region; no two have the same place, which grows with addresses."""

    region: Region
    place: int


@dataclass(frozen=True)
class Word:
    """A saved PC in memory; a stale one is below the stack pointer of that stack."""

    stack: Stack
    code: Code
    is_stale: bool


@dataclass(eq=False)
class Frame:
    """A signal frame: the PC that a signal interrupted, and where in memory that is."""

    saved: Code | None
    stack: Stack


@dataclass(eq=False)
class Continuation:
    """Something that runs, or could be made to run again."""

    base: Stack
    alternate: Stack
    pc: Code | None = None
    frames: list[Frame] = field(default_factory=list)
    stale: list[Frame] = field(default_factory=list)
    """Frames that were returned from into code: words that nobody has overwritten yet."""

    @property
    def stack(self) -> Stack:
        """Where the stack pointer is."""
        return self.frames[-1].stack if self.frames else self.base

    @property
    def stacks(self) -> list[Stack]:
        """Where it is, and where what it interrupted is."""
        return [self.base, *(frame.stack for frame in self.frames)]

    @property
    def codes(self) -> set[Code]:
        """Where this is or can come back to."""
        return {code for code in (self.pc, *(f.saved for f in self.frames)) if code is not None}

    @property
    def words(self) -> list[Word]:
        """The PCs that are in memory."""
        frames = [(frame, False) for frame in self.frames]
        frames += [(frame, True) for frame in self.stale]
        return [Word(f.stack, f.saved, stale) for f, stale in frames if f.saved is not None]

    def settle(self) -> None:
        """Run code other than blocks' for a while: what is dead is overwritten."""
        self.pc = None
        self.stale.clear()


@dataclass(eq=False)
class Thread:
    """A thread."""

    key: ThreadKey
    continuation: Continuation
    is_asleep: bool = False
    n_switches: int = 0
    """Counted as the kernel does: when it falls asleep, not when it wakes."""


@dataclass(eq=False)
class Process:
    """An address space that maps the arena."""

    threads: dict[ThreadKey, Thread] = field(default_factory=dict)
    parked: list[Continuation] = field(default_factory=list)

    @property
    def continuations(self) -> list[Continuation]:
        """All of them, running and parked."""
        return [*(thread.continuation for thread in self.threads.values()), *self.parked]

    @property
    def words(self) -> list[Word]:
        """All PCs in its memory."""
        return [word for one in self.continuations for word in one.words]

    @property
    def regions(self) -> list[Region]:
        """Its memory map, in address order."""
        ends = {s.region for one in self.continuations for s in (one.base, one.alternate)}
        return sorted(ends | {word.stack.region for word in self.words}, key=lambda r: r.number)


class State(Enum):
    """Where a block is in its life."""

    LIVE = "live"
    RETIRED = "retired"
    FREE = "free"


class Program:
    """A target and its forked children.

    Args:
        n_threads: Threads to begin with.
        n_blocks: Blocks.
        stacks: Kinds of stacks that it makes for itself; none: it never switches stacks.
        is_tidy: Whether a saved PC stays in memory, and in its place, for as long as the
            code there can be resumed from it. Kernel signal frames do; a scheduler that
            pops PCs from lists of its own does not.
    """

    def __init__(
        self,
        *,
        n_threads: int,
        n_blocks: int,
        stacks: tuple[RegionKind, ...],
        is_tidy: bool,
    ) -> None:
        """Begin with threads that run outside all blocks."""
        self.states = [State.LIVE] * n_blocks
        self.ages = [0] * n_blocks
        self.frozen: set[ThreadKey] = set()
        self.dead_keys: set[ThreadKey] = set()
        self.spare_keys: set[ThreadKey] = set()
        """Of threads that were gone at a listing: the kernel may give them to others."""
        self._stacks = stacks
        self._is_tidy = is_tidy
        self._n_regions = 0
        self._n_stacks = 0
        self._n_ids = 100
        target = Process()
        self.processes = [target]
        for _ in range(n_threads):
            self._add_thread(target, (100, self._next_id()), self._fresh(target, 0))
        self._steps: tuple[Callable[[Process, Thread, int], None], ...] = (
            *(self._enter, self._leave, self._interrupt, self._return, self._jump_out),
            *(self._sleep, self._wake, self._spawn, self._exit, self._fork),
            *(self._enter, self._interrupt, self._sleep, self._wake, self._return),
            *((self._park, self._resume, self._swap, self._resume) if stacks else ()),
            *(() if is_tidy else (self._move,)),
        )

    # --- blocks

    def code_of(self, block: int) -> RetiredCode:
        """Return where a block is."""
        start = BASE + block * 2 * BLOCK_SIZE
        return RetiredCode(Addr(start), Addr(start + BLOCK_SIZE))

    def block_at(self, code: RetiredCode) -> int:
        """Return which block that is."""
        return (code.start - BASE) // (2 * BLOCK_SIZE)

    def addr_of(self, code: Code) -> int:
        """Return the address of a PC."""
        return self.code_of(code[0]).start + 8

    def reuse(self, block: int) -> None:
        """Put another block where one was freed."""
        assert self.states[block] is State.FREE
        self.states[block] = State.LIVE
        self.ages[block] += 1

    def find_lost(self) -> list[Code]:
        """Return PCs in code that is not there any more: the program is about to crash."""
        codes = {code for p in self.processes for one in p.continuations for code in one.codes}
        return sorted(
            (block, age)
            for block, age in codes
            if self.states[block] is State.FREE or self.ages[block] != age
        )

    # --- what the program does

    def threads(self) -> list[tuple[Process, Thread]]:
        """Return all threads."""
        return [(p, thread) for p in self.processes for thread in p.threads.values()]

    def step(self, number: int) -> None:
        """Let one thread do one thing, if it can."""
        number, n = divmod(number, len(self._steps))
        able = [one for one in self.threads() if one[1].key not in self.frozen]
        if not able:
            return
        number, i = divmod(number, len(able))
        process, thread = able[i]
        # A thread that sleeps does nothing but wake.
        if thread.is_asleep is (self._steps[n] == self._wake):
            self._steps[n](process, thread, number)

    def _enter(self, _process: Process, thread: Thread, number: int) -> None:
        """Call or jump into a block that something leads to."""
        live = [b for b, state in enumerate(self.states) if state is State.LIVE]
        if live and thread.continuation.pc is None:
            block = live[number % len(live)]
            thread.continuation.settle()
            thread.continuation.pc = (block, self.ages[block])

    def _leave(self, _process: Process, thread: Thread, _number: int) -> None:
        """Go on to where the block leads."""
        thread.continuation.settle()

    def _interrupt(self, _process: Process, thread: Thread, number: int) -> None:
        """Run a signal handler, on the same stack or an alternate one."""
        one = thread.continuation
        stack = one.alternate if number % 2 or one.stack is one.alternate else one.stack
        one.frames.append(Frame(one.pc, stack))
        one.pc = None

    def _return(self, _process: Process, thread: Thread, _number: int) -> None:
        """Return from a handler to what it interrupted."""
        one = thread.continuation
        if one.frames and one.pc is None:
            frame = one.frames.pop()
            one.pc = frame.saved
            if self._is_tidy and frame.saved is not None:
                one.stale.append(frame)

    def _jump_out(self, _process: Process, thread: Thread, number: int) -> None:
        """Leave handlers by siglongjmp, or by an exception: what they interrupted is no more."""
        one = thread.continuation
        if one.pc is None:
            one.settle()
            del one.frames[number % (len(one.frames) + 1) :]

    def _sleep(self, _process: Process, thread: Thread, _number: int) -> None:
        """Block in the kernel, or, inside a block, on a page fault."""
        thread.is_asleep = True
        thread.n_switches += 1

    def _wake(self, _process: Process, thread: Thread, _number: int) -> None:
        """Run again."""
        thread.is_asleep = False

    def _spawn(self, process: Process, thread: Thread, number: int) -> None:
        """Start a thread; or another process in the same memory (CLONE_VM)."""
        if thread.continuation.pc is None and len(self.threads()) < 6:
            tid = self._next_id()
            key = (tid if number % 4 == 0 else thread.key[0], tid)
            spare = sorted(key for key in self.spare_keys if key[0] == thread.key[0])
            key = spare[0] if spare and number % 4 == 1 else key
            self._add_thread(process, key, self._fresh(process, 0))

    def _fork(self, process: Process, thread: Thread, number: int) -> None:
        """Fork: the child has a copy of this thread, and of all memory."""
        if thread.continuation.pc is not None or len(self.threads()) >= 6:
            return
        child = Process()
        one, parked = copy.deepcopy((thread.continuation, process.parked))
        child.parked = parked
        pid = self._next_id()
        spare = sorted(key for key in self.spare_keys if key[0] == key[1])
        key = spare[0] if spare and number % 2 else (pid, pid)
        self.processes.append(child)
        self._add_thread(child, key, one)

    def _exit(self, process: Process, thread: Thread, _number: int) -> None:
        """Exit, in a handler perhaps; the target's last thread stays."""
        if thread.continuation.pc is None:
            if process is self.processes[0] and len(process.threads) == 1:
                return
            del process.threads[thread.key]
            self.dead_keys.add(thread.key)
            if not process.threads:
                self.processes.remove(process)

    def _park(self, process: Process, thread: Thread, number: int) -> None:
        """Switch to a stack made for that, out of a handler too; go on here later."""
        if thread.continuation.pc is None and len(process.parked) < 3:
            process.parked.append(thread.continuation)
            thread.continuation = self._fresh(process, number + 1)

    def _resume(self, process: Process, thread: Thread, number: int) -> None:
        """Go on with what was parked, by any thread; what ran here is over."""
        one = thread.continuation
        if one.pc is None and process.parked:
            thread.continuation = process.parked.pop(number % len(process.parked))

    def _swap(self, process: Process, thread: Thread, number: int) -> None:
        """Park and resume at once."""
        one = thread.continuation
        if one.pc is None and process.parked:
            i = number % len(process.parked)
            thread.continuation, process.parked[i] = process.parked[i], one

    def _move(self, process: Process, _thread: Thread, number: int) -> None:
        """Copy a parked context to other memory and clear what it was in."""
        frames = [frame for one in process.parked for frame in one.frames]
        if frames:
            number, i = divmod(number, len(frames))
            regions = process.regions
            frames[i].stack = self._new_stack(regions[number % len(regions)], number // 2)

    def _fresh(self, process: Process, number: int) -> Continuation:
        """Return what a coroutine begins with; a thread, on a stack of its own, if it is 0."""
        if not self._stacks:
            own, other = (self._new_stack(self._new_region(RegionKind.OWN), 1) for _ in range(2))
            return Continuation(own, other)
        base = self._new_region(self._stacks[number % len(self._stacks)] if number else _OWN)
        # Two stacks in three lie in memory that has others, above them or below.
        regions = [*process.regions, base, self._new_region(self._stacks[0])]
        if number % 3:
            base = regions[number // 3 % len(regions)]
        alternate = regions[-1 - number // 7 % len(regions)]
        return Continuation(
            self._new_stack(base, number // 2), self._new_stack(alternate, number // 4)
        )

    def _new_stack(self, region: Region, number: int) -> Stack:
        """Begin a stack above all there are, or below."""
        self._n_stacks += 1
        return Stack(region, self._n_stacks if number % 2 else -self._n_stacks)

    def _new_region(self, kind: RegionKind) -> Region:
        """Map memory: above what there is and below it by turns."""
        self._n_regions += 1
        n = self._n_regions
        return Region(kind, n if n % 2 else -n)

    def _next_id(self) -> int:
        """Return a pid or tid that there never was."""
        self._n_ids += 1
        return self._n_ids

    def _add_thread(self, process: Process, key: ThreadKey, one: Continuation) -> None:
        """Start a thread."""
        process.threads[key] = Thread(key, one)
        self.dead_keys.discard(key)
        self.spare_keys.discard(key)

    def calm_down(self) -> None:
        """Let all threads leave all blocks, and all contexts be done with."""
        for process in self.processes:
            process.parked.clear()
            for thread in process.threads.values():
                thread.continuation.settle()
                thread.continuation.frames.clear()
