# SPDX-License-Identifier: Apache-2.0
"""Hold a target still for a moment.

``stop_threads`` is the only way the project stops a program. All requests run
on a throwaway OS thread (``tracer_thread``), so leaving the ``with`` block lets
go of everything in every case. Nothing stays attached between stops.

Invariants of the window between the first interrupt and the last detach: no
garbage collection, and real-time priority where we may have it, because a
controller of normal priority starves among thousands of busy threads.

Limits: a thread that was running when it was looked at and fell asleep before it
was interrupted is woken. The calls that answer EINTR then are put right, but a
transfer it had just begun may be cut short, and a relative timeout of
epoll_wait or semtimedop begins again. Should we die between waking a thread in
such a call and putting its EINTR right (microseconds), it sees the EINTR.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import Enum
from typing import TypeVar

from optpoline.errors import OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.process.injection_code import InjectionCode, find_injection_code
from optpoline.process.injector import Injector
from optpoline.process.memory import RemoteMemory
from optpoline.process.priority import at_real_time
from optpoline.process.ptrace import Tracer
from optpoline.process.rseq import RseqRegistration
from optpoline.process.sharers import SharerFinder
from optpoline.process.stop_lock import one_stop_at_a_time
from optpoline.process.stopper import Stopper, Tracee
from optpoline.process.tracer_thread import TracerThread

__all__ = ["DEFAULT_TIMEOUT_NS", "Stop", "StoppedThread", "Wake", "stop_threads"]

DEFAULT_TIMEOUT_NS = 500_000_000
"""How long to wait for threads to stand; 2,000 busy ones took 25 ms."""

_T = TypeVar("_T")


class Wake(Enum):
    """Which sleeping threads may be disturbed."""

    NONE = "none"
    """None; ``inject`` works only if a running thread was stopped."""
    ONE_FOR_INJECTION = "one_for_injection"
    """One, and only when ``inject`` is called and no running thread was stopped."""
    UNNOTICED = "unnoticed"
    """All in calls that the kernel goes on with, timeouts included."""
    ALL = "all"
    """All but those in uninterruptible sleep."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StoppedThread:
    """A thread that stands.

    Attributes:
        pid: Its process; not the target's for a process that shares its memory.
        tid: The thread.
        pc: Its next instruction; in a call, the one behind the ``syscall``.
        sp: Its stack pointer.
        thread_pointer: Base of its fs segment, which its thread-local storage is found by.
        in_syscall: Whether it was stopped in a system call.
        signal: The signal it is about to take, or 0.
    """

    pid: int
    tid: int
    pc: Addr
    sp: Addr
    thread_pointer: Addr
    in_syscall: bool
    signal: int


class Stop:
    """A target that stands; made by ``stop_threads``."""

    def __init__(
        self, thread: TracerThread, stopper: Stopper, code: InjectionCode | None, wake: Wake
    ) -> None:
        """Keep what the requests need."""
        self._thread = thread
        self._stopper = stopper
        self._stopped: tuple[StoppedThread, ...] = ()
        self._injector: Injector | None = None
        if code is not None:
            self._injector = Injector(stopper, code, may_wake=wake is not Wake.NONE)
        self.duration_ns = 0
        """From first interrupt to last detach; 0 until it is over, or if nobody ran."""

    @property
    def stopped(self) -> tuple[StoppedThread, ...]:
        """The threads that stand."""
        # Those that are stopped later come behind, and none is let go on before the end: with
        # thousands, what was made of them once is worth keeping.
        if len(self._stopped) != len(self._stopper.tracees):
            self._stopped = tuple(map(_as_thread, self._stopper.tracees.values()))
        return self._stopped

    @property
    def asleep(self) -> tuple[int, ...]:
        """Threads that slept in the kernel and were left alone; they may wake at any time."""
        return tuple(sorted(self._stopper.asleep))

    @property
    def sleepers(self) -> tuple[tuple[int, int], ...]:
        """The same with their processes: (pid, tid), those that share the memory included."""
        return tuple(sorted((pid, tid) for tid, pid in self._stopper.asleep.items()))

    def read_rseq_registrations(self) -> tuple[RseqRegistration, ...]:
        """Return what each thread that stands has told the kernel about rseq."""
        return self._thread.call(self._read_rseq_registrations)

    def _read_rseq_registrations(self, tracer: Tracer) -> tuple[RseqRegistration, ...]:
        """Ask for all; on the tracer thread."""
        registrations: list[RseqRegistration] = []
        for tracee in self._stopper.tracees.values():
            try:
                area_addr, signature = tracer.read_rseq_area(tracee.tid)
            except ProcessGone:
                continue  # killed meanwhile
            registrations.append(
                RseqRegistration(
                    tid=tracee.tid,
                    thread_pointer=tracee.regs.fs_base,
                    area_addr=area_addr,
                    signature=signature,
                    # A child of vfork is as young, but runs with what its parent has.
                    is_newborn=tracee.pid == self._stopper.pid and tracee.regs.is_newborn,
                )
            )
        return tuple(registrations)

    def sweep(self) -> None:
        """Stop threads that have woken since.

        Raises:
            StopTimeout: if one does not stop in time.
            ProcessGone: if the target is gone.
        """
        self._thread.call(lambda _: self._stopper.sweep())

    @property
    def injector_tid(self) -> int | None:
        """The thread that runs injected calls, None before the first."""
        return self._injector.tid if self._injector is not None else None

    def run(self, work: Callable[[], _T]) -> _T:
        """Run a function that makes many requests, all on the thread that makes them.

        To hand each over there and back takes 30 us, for which the target stands. Who is
        interrupted meanwhile (Ctrl-C) gets the interrupt when the function has ended.
        """
        return self._thread.call(lambda _: work())

    def inject(self, nr: int, *args: int | bytes) -> int:
        """Run one system call in the target.

        Args:
            nr: Number of the call (x86/syscalls.py).
            args: Up to six arguments; bytes are put on the thread's stack for the
                length of the call and passed by address.

        Returns:
            Its result; an error as the negative error number.

        Raises:
            UnsupportedTarget: if no thread can run it, or seccomp may forbid it.
            ProcessGone: if the thread was killed.
        """
        injector = self._injector
        if injector is None:
            raise OptpolineError("nothing can be injected into a stop that may wake no thread")
        return self._thread.call(lambda _: injector.inject(nr, args))

    def _begin(self) -> None:
        """Stop the threads."""
        self._thread.call(lambda _: self._stopper.stop())

    def _end(self) -> None:
        """Let the threads go."""
        end_ns = 0
        try:
            end_ns = self._thread.call(self._release)
        finally:
            if self._stopper.begin_ns:
                # What could not be let go goes with the tracer thread, right behind this.
                self.duration_ns = (end_ns or time.monotonic_ns()) - self._stopper.begin_ns

    def _release(self, _: Tracer) -> int:
        """Do so; on the tracer thread. Return when, as time.monotonic_ns()."""
        if self._injector is not None:
            self._injector.leave()
        return self._stopper.release()


def _as_thread(tracee: Tracee) -> StoppedThread:
    """Return what is told of a thread that stands."""
    return StoppedThread(
        pid=tracee.pid,
        tid=tracee.tid,
        pc=Addr(tracee.regs.rip),
        sp=Addr(tracee.regs.rsp),
        thread_pointer=Addr(tracee.regs.fs_base),
        in_syscall=tracee.regs.in_syscall,
        signal=tracee.code.delivered_signal,
    )


@contextmanager
def stop_threads(
    pid: int,
    *,
    memory: RemoteMemory,
    wake: Wake = Wake.ONE_FOR_INJECTION,
    timeout_ns: int = DEFAULT_TIMEOUT_NS,
    code: InjectionCode | None = None,
    sharers: SharerFinder | None = None,
    on_end: Callable[[int], None] | None = None,
) -> Iterator[Stop]:
    """Stop the threads of a process, and of those that share its memory, for a block.

    Target state: inside the block every thread that ran stands; outside, all run.
    On error: all run.

    Args:
        pid: The target.
        memory: Its memory, opened on the program that is meant.
        wake: Which sleeping threads may be disturbed.
        timeout_ns: How long to wait for threads to stand.
        code: What ``find_injection_code`` found; searched for when None and wake
            allows injection, which takes milliseconds before the stop.
        sharers: Finds who shares the memory; one that has looked before is faster.
        on_end: Told the stop's length in nanoseconds when it is over, 0 if nobody ran; also
            of one that ends in an error, even if not all threads stood.

    Raises:
        StopTimeout: if threads do not stop in time.
        ProcessGone: if the target exits or executes another program.
        PermissionDenied: if a thread cannot be traced.
        UnsupportedTarget: if injection is allowed for and cannot work.
    """
    if code is None and wake in (Wake.ONE_FOR_INJECTION, Wake.ALL):
        code = find_injection_code(pid, memory)
    sharers = sharers or SharerFinder(pid)
    sharers.look()  # the long look before the stop: in it only those are looked at who are new
    with one_stop_at_a_time(pid, timeout_ns=timeout_ns), _undisturbed():
        thread = TracerThread()
        try:
            stop = thread.call(
                lambda tracer: Stop(
                    thread,
                    Stopper(
                        pid=pid,
                        memory=memory,
                        tracer=tracer,
                        sharers=sharers,
                        wakes_all=wake is Wake.ALL,
                        wakes_unnoticed=wake is Wake.UNNOTICED,
                        timeout_ns=timeout_ns,
                    ),
                    code,
                    wake,
                )
            )
            thread.on_stall = stop._stopper.reap_dead
            try:
                stop._begin()
                yield stop
            finally:
                try:
                    stop._end()
                finally:
                    if on_end is not None:
                        on_end(stop.duration_ns)
        finally:
            thread.finish()


@contextmanager
def _undisturbed() -> Iterator[None]:
    """Run a block without garbage collection and at real-time priority if allowed."""
    has_gc = gc.isenabled()
    gc.disable()
    try:
        with at_real_time():  # which the tracer thread, started inside, inherits
            yield
    finally:
        if has_gc:
            gc.enable()
