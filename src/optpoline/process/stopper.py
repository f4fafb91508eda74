# SPDX-License-Identifier: Apache-2.0
"""Stop the running threads of a target; runs on the tracer thread of one stop.

Threads asleep in the kernel are left alone: they run no program code until they
return, and waking them is what programs notice (EINTR, short transfers). New
threads are found by listing again until a listing has no new one, rather than
by PTRACE_O_TRACECLONE: once every running thread has stopped only threads not
yet listed can make others, and no extra kind of stop has to be handled in the
window. The same goes for processes that share the memory. A program that makes threads
faster than they can be stopped runs into the deadline. Workers of the kernel are left out:
they run no program code, now or later.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone, StopTimeout
from optpoline.process.busy import (
    MAX_LOOKED_AT,
    find_busy,
    is_asleep_or_transferring,
    is_transferring,
    moving_between_cpus,
)
from optpoline.process.inject import wait_for_stop
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import RUNS_NO_CODE, list_tids, read_seccomp_mode, read_state_char
from optpoline.process.ptrace import StopCode, Tracer, reap_thread
from optpoline.process.receiving import is_socket
from optpoline.process.sharers import SharerFinder
from optpoline.process.thread_state import (
    ThreadState,
    ThreadWhere,
    has_slept_since,
    read_thread_state,
)
from optpoline.process.waking import rank_waking
from optpoline.x86.registers import Registers
from optpoline.x86.syscalls import (
    ERESTART_RESTARTBLOCK,
    ERESTARTNOHAND,
    Disturbance,
    begin_again,
    is_restartable_eintr,
)

__all__ = ["Stopper", "Tracee"]

_EINTR = 4
_UNNOTICED = (Disturbance.NONE, Disturbance.RESTART_BLOCK)
"""The kernel goes on with the call, its timeout included, as if nothing had been."""
_FIRST_POLL_S = 10e-6
_MAX_POLL_S = 200e-6
_CHECK_STATE_NS = 1_000_000
_MAX_RUNNING_POLLED = 8
_MAX_PATIENT_LISTINGS = 32
"""After so many listings with threads that run, all are stopped that do."""

_LIST_AGAIN_NS = 10_000_000
"""Without a thread that came to stand, when to look for some that have begun to run; then
after twice that, and so on."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Tracee:
    """A thread that has stopped.

    Attributes:
        pid: Its process; another than the target's for one that shares its memory.
        tid: The thread.
        code: Why it stopped.
        regs: Its registers, with an EINTR of our making already undone.
    """

    pid: int
    tid: int
    code: StopCode
    regs: Registers


@dataclass(slots=True)
class Stopper:
    """The state of one stop.

    Attributes:
        pid: The target.
        memory: Its memory.
        tracer: Requests of the tracer thread.
        sharers: Finds who shares its memory; best asked shortly before.
        wakes_all: Whether sleeping threads are interrupted too.
        wakes_unnoticed: Whether those of them are that do not notice.
        deadline_ns: time.monotonic_ns() by which all must stand; set at the first interrupt.
        timeout_ns: The same as a duration.
        tracees: Threads that have stopped.
        asleep: Threads left asleep.
        begin_ns: When the first thread was interrupted, 0 before.
    """

    pid: int
    memory: RemoteMemory
    tracer: Tracer
    sharers: SharerFinder
    wakes_all: bool
    timeout_ns: int
    wakes_unnoticed: bool = False
    deadline_ns: int = 0
    tracees: dict[int, Tracee] = field(default_factory=dict)
    asleep: dict[int, int] = field(default_factory=dict)
    begin_ns: int = 0
    _n_listings: int = 0
    _pids: list[int] = field(default_factory=list)
    _pending: dict[int, int] = field(default_factory=dict)
    _left_seized: dict[int, int] = field(default_factory=dict)
    _seized: set[int] = field(default_factory=set)
    _wakeable: dict[int, ThreadState] = field(default_factory=dict)

    def stop(self) -> None:
        """Stop every running thread.

        On error: whatever was stopped is let go by ``release`` or the thread's end.

        Raises:
            StopTimeout: if threads do not stop in time.
            ProcessGone: if the target exits or executes another program.
            PermissionDenied: if a thread cannot be traced.
        """
        self._pids = [self.pid, *self.sharers.look()]
        self.sweep()
        if not self.memory.is_current() or not (self.tracees or self.asleep):
            raise ProcessGone(self.pid, f"process {self.pid} has exited or run a new program")

    def sweep(self) -> None:
        """Stop threads that have woken or appeared, until none has."""
        while True:
            self._interrupt_running()
            if self._pending:
                self._collect_pending()
            elif not self._find_new_sharers():
                return
            if self.begin_ns and time.monotonic_ns() >= self.deadline_ns:
                raise self._timeout()

    def release(self) -> int:
        """Let every thread go on; return when, as time.monotonic_ns().

        What cannot be let go here (it is not stopped) goes when the tracer thread ends.
        """
        for tid, pid in (*self._pending.items(), *self._left_seized.items()):
            self._try_detach(pid, tid)
        for tracee in self.tracees.values():
            try:
                self.tracer.detach(tracee.tid, tracee.code.delivered_signal)
            except OptpolineError:
                continue  # killed meanwhile
        self.tracees = {}
        return time.monotonic_ns()

    def reap_dead(self) -> None:
        """Reap dead tracees, from another thread than the tracer's when that one stalls.

        A thread that executes another program kills the others and waits until
        each is reaped, by its tracer if it has one, holding a lock that
        PTRACE_SEIZE of any thread takes (cred_guard_mutex): while we seize one
        thread, others of ours may wait for us to be reaped.
        """
        for tid in tuple(self._seized):
            if tid not in self._pids:
                reap_thread(tid)

    def _try_detach(self, pid: int, tid: int) -> None:
        """Detach a thread that may have stopped too late."""
        try:
            code = self.tracer.poll(tid)
            if code is not None:
                self._restore_wait(pid, tid, self.tracer.read_registers(tid))
                self.tracer.detach(tid, code.delivered_signal)
        except OptpolineError:
            return  # gone, or still not stopped: the thread's end lets it go

    def _find_new_sharers(self) -> bool:
        """Look for processes that share the memory, while no thread runs that could start one.

        A child of a vfork() is one; they may be anybody's children.
        """
        new = [pid for pid in self.sharers.look() if pid not in self._pids]
        self._pids += new
        return bool(new)

    def _find_running(self) -> None:
        """Seize running threads that are not ours yet; note who is asleep."""
        self.asleep = {}
        runnable: dict[int, int] = {}
        for pid in tuple(self._pids):
            try:
                tids = list_tids(pid)
            except ProcessGone:
                if pid == self.pid:
                    raise
                self._pids.remove(pid)
                continue
            for tid in tids:
                if tid in self.tracees or tid in self._pending:
                    continue
                try:
                    state = read_state_char(pid, tid)
                    # Who is stopped by job control may be continued at any time.
                    is_wakeable = state == "S" or (state == "T" and self.wakes_all)
                    may_wake = is_wakeable and self._may_wake(pid, tid)
                except ProcessGone:
                    continue
                if state == "R":
                    runnable[tid] = pid
                elif may_wake:
                    if self._seize(pid, tid):
                        self._pending[tid] = pid
                elif state not in RUNS_NO_CODE:
                    self.asleep[tid] = pid
        # Those left alone may go on and make others run without end.
        is_patient = self._n_listings < _MAX_PATIENT_LISTINGS
        self._n_listings += 1
        busy = find_busy(runnable) if is_patient else set(runnable)
        for tid, pid in runnable.items():
            if tid not in busy:
                self.asleep[tid] = pid
            elif self._seize(pid, tid):
                self._pending[tid] = pid

    def _seize(self, pid: int, tid: int) -> bool:
        """Seize a thread; False if it is gone."""
        if tid in self._left_seized:
            del self._left_seized[tid]
            return True
        try:
            self.tracer.seize(tid)
        except ProcessGone:
            return False
        except PermissionDenied:
            try:
                if read_state_char(pid, tid) in RUNS_NO_CODE:
                    return False
            except ProcessGone:
                return False
            raise
        self._seized.add(tid)
        return True

    def _timeout(self) -> StopTimeout:
        """Return the error that names the threads still waited for."""
        pids = set(self._pending.values())
        # Threads of others that share the memory are stopped as well.
        pid = pids.pop() if len(pids) == 1 else self.pid
        return StopTimeout(self.timeout_ns, tuple(sorted(self._pending)), pid=pid)

    def _interrupt_running(self) -> None:
        """Ask threads that run, and have not been asked, to stop.

        All are seized before, and waited for after, so that they stop at once.
        """
        with moving_between_cpus():
            self._ask_running()

    def _ask_running(self) -> None:
        """Ask them, on the CPUs that they run on."""
        before = set(self._pending)
        self._find_running()
        asked = [tid for tid in self._pending if tid not in before]
        if asked and not self.begin_ns:
            self.begin_ns = time.monotonic_ns()
            self.deadline_ns = self.begin_ns + self.timeout_ns
        # One may have begun a transfer, or fallen asleep, since it was found busy.
        is_patient = self._n_listings <= _MAX_PATIENT_LISTINGS
        may_leave = is_patient and len(asked) <= MAX_LOOKED_AT
        wakes_some = self.wakes_all or self.wakes_unnoticed
        must_leave = is_transferring if wakes_some else is_asleep_or_transferring
        for tid in asked:
            pid = self._pending[tid]
            if may_leave and not self._still_sleeps(pid, tid) and must_leave(pid, tid):
                self._left_seized[tid] = self.asleep[tid] = self._pending.pop(tid)
            else:
                self._interrupt(tid)

    def _still_sleeps(self, pid: int, tid: int) -> bool:
        """Tell whether a thread sleeps on in the call that it may be woken from.

        The stack of one that waits to receive looks like that of one in the middle of it.
        """
        state = self._wakeable.pop(tid, None)
        try:
            return state is not None and has_slept_since(pid, state)
        except ProcessGone:
            return False

    def _may_wake(self, pid: int, tid: int) -> bool:
        """Tell whether a sleeping thread is to be woken in this stop."""
        if not self.wakes_all and not self.wakes_unnoticed:
            return False
        # It may have begun another call since the stop was decided on.
        state = read_thread_state(pid, tid)
        rank = rank_waking(pid, state)
        may_wake = rank < Disturbance.HARMFUL if self.wakes_all else rank in _UNNOTICED
        if may_wake and state.where is ThreadWhere.IN_SYSCALL:
            self._wakeable[tid] = state
        return may_wake

    def _interrupt(self, tid: int) -> None:
        """Ask a seized thread to stop."""
        try:
            self.tracer.interrupt(tid)
        except ProcessGone:
            del self._pending[tid]

    def _collect_pending(self) -> None:
        """Wait until the interrupted threads stand."""
        pause_s = _FIRST_POLL_S
        checked_ns = idle_since_ns = time.monotonic_ns()
        list_again_ns = _LIST_AGAIN_NS
        while self._pending:
            has_progress = self._collect_some()
            if not self._pending:
                return
            now_ns = time.monotonic_ns()
            if has_progress:
                # Each of a thousand threads takes its time: nothing is wrong while they come.
                pause_s, checked_ns, idle_since_ns = _FIRST_POLL_S, now_ns, now_ns
            if now_ns >= self.deadline_ns:
                raise self._timeout()
            if now_ns - checked_ns > _CHECK_STATE_NS:
                checked_ns = now_ns
                self._drop_unstoppable()
            if now_ns - idle_since_ns > list_again_ns:
                # Those that have begun to run keep the ones we wait for off their CPU.
                list_again_ns *= 2
                self._interrupt_running()
            # A sleep, not a spin: at real-time priority we could keep the very
            # threads we wait for off their CPU.
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, _MAX_POLL_S)

    def _collect_some(self) -> bool:
        """Take threads that stand until a few that do not are met; say if any was taken.

        Going through all of them each time would keep us on the CPU that many
        threads need to come to their stop.
        """
        has_progress, n_running = False, 0
        for tid, pid in tuple(self._pending.items()):
            try:
                code = self.tracer.poll(tid)
                if code is not None:
                    self._take(pid, tid, code)
            except ProcessGone:
                code = StopCode(0)
            del self._pending[tid]
            if code is not None:
                has_progress = True
                continue
            self._pending[tid] = pid  # at the end of the line
            n_running += 1
            if n_running == _MAX_RUNNING_POLLED:
                break
        return has_progress

    def _drop_unstoppable(self) -> None:
        """Give up waiting for threads that died or sleep uninterruptibly.

        Looks at those whose turn is next only, for the same reason.
        """
        for tid, pid in tuple(self._pending.items())[:_MAX_RUNNING_POLLED]:
            try:
                state = read_state_char(pid, tid)
            except ProcessGone:
                state = "X"
            if state in RUNS_NO_CODE:
                del self._pending[tid]
            elif state == "D":
                # It runs no program code either: the trap comes before any.
                del self._pending[tid]
                self._left_seized[tid] = self.asleep[tid] = pid

    def _take(self, pid: int, tid: int, code: StopCode) -> None:
        """Add a thread that stands."""
        regs = self._restore_wait(pid, tid, self.tracer.read_registers(tid))
        self.tracees[tid] = Tracee(pid=pid, tid=tid, code=code, regs=regs)

    def _restore_wait(self, pid: int, tid: int, regs: Registers) -> Registers:
        """Undo an EINTR that our stop caused, or a restart that a filter might forbid.

        With -ERESTARTNOHAND the kernel waits again when there is no signal to
        handle, and answers EINTR when there is one.
        """
        if not regs.in_syscall:
            return regs
        restored = regs
        if regs.result == -ERESTART_RESTARTBLOCK and read_seccomp_mode(pid, tid):
            restored = begin_again(regs)
        elif regs.result == -_EINTR and is_restartable_eintr(
            regs, is_socket=is_socket(pid, tid, regs.rdi)
        ):
            restored = regs.with_result(-ERESTARTNOHAND)
        if restored is not regs:
            self.tracer.write_registers(tid, restored)
        return restored

    def wake(self, tid: int) -> Tracee | None:
        """Stop a sleeping thread of the target; None if it exits instead.

        Raises:
            StopTimeout: if it does not stop in time.
        """
        if not self._seize(self.pid, tid):
            return None
        self._pending[tid] = self.pid
        now_ns = time.monotonic_ns()
        if not self.begin_ns:
            self.begin_ns = now_ns
            self.deadline_ns = now_ns + self.timeout_ns
        self._interrupt(tid)
        deadline_ns = now_ns + self.timeout_ns
        try:
            code = wait_for_stop(self.tracer, self.pid, tid, deadline_ns)
            if code is None:
                raise StopTimeout(self.timeout_ns, (tid,), pid=self.pid)
            self._take(self.pid, tid, code)
        except ProcessGone:
            return None
        finally:
            self.asleep.pop(tid, None)
        del self._pending[tid]
        return self.tracees[tid]
