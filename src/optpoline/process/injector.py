# SPDX-License-Identifier: Apache-2.0
"""Choose the thread of a stopped target that runs injected system calls, and lend it to them.

A thread that stands is taken where there is one that does not notice (``process/inject.py``
says how). Where only sleeping threads are left, and one may be woken, the one is woken that
notices least.
"""

from __future__ import annotations

import struct
import time

from optpoline.errors import OptpolineError, ProcessGone, TargetFault, UnsupportedTarget
from optpoline.process.busy import moving_between_cpus
from optpoline.process.inject import InjectionThread
from optpoline.process.injection_code import InjectionCode
from optpoline.process.leader import is_exiting
from optpoline.process.memory import RemoteMemory
from optpoline.process.ptrace import StopCode, Tracer
from optpoline.process.rseq import RSEQ_CS_OFF
from optpoline.process.stopper import Stopper, Tracee
from optpoline.process.thread_state import read_thread_state
from optpoline.process.waking import rank_waking
from optpoline.x86.registers import USER_CODE_SELECTOR, Registers
from optpoline.x86.syscalls import ERESTART_RESTARTBLOCK, Disturbance, has_temporary_mask

__all__ = ["Injector"]

_LEAVE_TIMEOUT_NS = 1_000_000_000
_FIND_NS = 20_000_000
"""How long to look for a thread; short, as others may stand meanwhile."""

_LOOK_EVERY_S = 200e-6
_RSEQ_DESCRIPTOR = struct.Struct("<IIQQQ")


class Injector:
    """Runs system calls in one thread of a target; all of it on the tracer thread.

    Args:
        stopper: Has stopped the target's threads; wakes one if asked to.
        code: What ``find_injection_code`` found.
        may_wake: Whether a sleeping thread may be woken for it.
    """

    def __init__(self, stopper: Stopper, code: InjectionCode, *, may_wake: bool) -> None:
        """Choose no thread before the first call."""
        self._stopper = stopper
        self._code = code
        self._may_wake = may_wake
        self._thread: InjectionThread | None = None

    @property
    def tid(self) -> int | None:
        """The thread that runs injected calls, None before the first."""
        return self._thread.tid if self._thread is not None else None

    def inject(self, nr: int, args: tuple[int | bytes, ...]) -> int:
        """Run a system call in a thread of the target.

        Raises:
            UnsupportedTarget: if no thread can be used.
            ProcessGone: if the thread is killed.
        """
        if self._thread is None:
            self._thread = self._enter()
        deadline_ns = time.monotonic_ns() + max(self._stopper.timeout_ns, _LEAVE_TIMEOUT_NS)
        return self._thread.call(nr, *args, deadline_ns=deadline_ns)

    def leave(self) -> None:
        """Put the thread back to where it was; to be called before threads are let go.

        One in which an injected call hangs goes when the tracer thread ends.
        """
        if self._thread is None:
            return
        try:
            self._thread.leave(deadline_ns=time.monotonic_ns() + _LEAVE_TIMEOUT_NS)
        except OptpolineError:
            # Detached half-way it would return through its signal frame, and so it
            # does when this thread ends; a killed one is gone either way.
            self._stopper.tracees.pop(self._thread.tid, None)

    def _enter(self) -> InjectionThread:
        """Choose a thread and prepare it."""
        stopper = self._stopper
        if not self._is_code_present():
            raise UnsupportedTarget(
                f"process {stopper.pid} has unmapped the code that injection uses"
            )
        end_ns = time.monotonic_ns() + _FIND_NS
        while True:
            for tracee in sorted(stopper.tracees.values(), key=_rank_stopped):
                if (injection := self._try_enter(tracee)) is not None:
                    return injection
            for tid in self._rank_asleep() if self._may_wake else ():
                woken = stopper.wake(tid)
                # It may have executed another program before it stopped.
                if not stopper.memory.is_current() or not self._is_code_present():
                    raise ProcessGone(stopper.pid, f"process {stopper.pid} runs a new program")
                injection = None if woken is None else self._try_enter(woken)
                if injection is not None:
                    return injection
            if not self._may_wake or time.monotonic_ns() >= end_ns:
                break
            # One may come out of its call, or into one that it may be woken from.
            time.sleep(_LOOK_EVERY_S)
            stopper.sweep()
        if is_exiting(stopper.pid):
            raise ProcessGone(stopper.pid)
        raise UnsupportedTarget(
            f"no thread of process {stopper.pid} can run a system call for us now",
            hint="its threads sleep in calls that must not be disturbed (try again later), or "
            "are under seccomp, on shadow stacks, on stacks without a guard page below, or have "
            "their system calls dispatched to themselves (as Wine does)",
        )

    def _is_code_present(self) -> bool:
        """Tell whether the target still has the code that injection uses."""
        return self._code.is_present(self._stopper.memory)

    def _try_enter(self, tracee: Tracee) -> InjectionThread | None:
        """Prepare a thread for injection, or return None if it will not do."""
        stopper = self._stopper
        tracer, memory = stopper.tracer, stopper.memory
        if tracee.pid != stopper.pid:
            return None
        if not _is_usable(tracer, memory, tracee.tid, tracee.code, tracee.regs):
            return None
        injection = InjectionThread(
            tracer, memory, self._code, pid=tracee.pid, tid=tracee.tid, regs=tracee.regs
        )
        try:
            injection.enter()
        except (TargetFault, UnsupportedTarget):
            return None  # no room on its stack, or a filter that might kill it
        return injection

    def _rank_asleep(self) -> list[int]:
        """Return sleeping threads that may be woken, those that notice least first."""
        ranked = []
        for tid, pid in self._stopper.asleep.items():
            if pid != self._stopper.pid:
                continue
            try:
                with moving_between_cpus():
                    rank = rank_waking(pid, read_thread_state(pid, tid), asks=True)
            except ProcessGone:
                continue
            if rank < Disturbance.HARMFUL:
                ranked.append((rank, tid))
        return [tid for _, tid in sorted(ranked)]


def _rank_stopped(tracee: Tracee) -> int:
    """Order stopped threads: in user code, in a restarted call, with a restart block."""
    if not tracee.regs.in_syscall or tracee.regs.result >= 0:
        return 0
    return 2 if tracee.regs.result == -ERESTART_RESTARTBLOCK else 1


def _is_usable(
    tracer: Tracer, memory: RemoteMemory, tid: int, code: StopCode, regs: Registers
) -> bool:
    """Say whether a stopped thread can run an injected call and not notice.

    Args:
        tracer: The tracer that stopped it.
        memory: Its memory.
        tid: The thread.
        code: How it stopped: one that is about to take a signal is left alone.
        regs: Its registers.
    """
    if not code.is_event_stop or regs.cs != USER_CODE_SELECTOR:
        return False
    if regs.in_syscall and has_temporary_mask(regs.orig_rax, regs.syscall_args):
        return False  # setting the mask would lose the one the call is to put back
    if tracer.has_shadow_stack(tid):
        return False  # our return address would not be on it
    if tracer.has_syscall_dispatch(tid):
        return False  # a call of ours could end in SIGSYS, which kills while it is blocked
    return not _is_in_rseq(tracer, memory, tid, regs.rip)


def _is_in_rseq(tracer: Tracer, memory: RemoteMemory, tid: int, pc: int) -> bool:
    """Say whether a thread stands in a restartable sequence.

    Running anything else there makes the kernel forget the sequence, and the
    thread would go on in it unprotected.
    """
    area, _ = tracer.read_rseq_area(tid)
    if not area:
        return False
    try:
        (descriptor_addr,) = struct.unpack("<Q", memory.read(area + RSEQ_CS_OFF, 8))
        if not descriptor_addr:
            return False
        data = memory.read(descriptor_addr, _RSEQ_DESCRIPTOR.size)
    except TargetFault:
        return True
    _, _, start, size, _ = _RSEQ_DESCRIPTOR.unpack(data)
    return bool(0 <= pc - start < size)
