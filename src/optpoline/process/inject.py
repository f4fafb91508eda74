# SPDX-License-Identifier: Apache-2.0
"""Run system calls in a stopped thread, such that we may die at any instant.

No byte of the target's text is changed and nothing is stepped. The thread is
put on a ``syscall`` instruction of its own vDSO, under PTRACE_SYSCALL, with a
signal frame on its stack that restores everything: what follows the ``syscall``
returns to an ``rt_sigreturn`` trampoline. While we live we restore it ourselves
and the frame is never used. If we die, the kernel lets the thread go on, and:

====  ==============================  ==========================================
step  we did                          left alone, the thread
====  ==============================  ==========================================
 1    write frame below the red zone  runs on; the frame is dead stack
 2    registers: on the ``syscall``,  makes that call, which does nothing, returns
      with the number of getpid       to the trampoline, which restores registers,
                                      vectors and mask; signals are still open: a
                                      handler runs below the frame and returns
                                      into this
 3    block all signals               as in 2; the mask comes from the frame
 4    go on to the entry stop         as in 2, from wherever it is
 5    number of the call we mean      makes the call before it is in user code
                                      again, then as in 2
 6    go on to the exit stop          as in 5
 7    next call: 2, 4 to 6 again      as there
 8    interrupt, go on to event stop  is behind the ``syscall``: returns as in 2
 9    signal mask back                as in 8; a signal taken now has its handler
                                      run below the frame
10    registers back                  is as it was found, restart still pending
====  ==============================  ==========================================

2 comes before 3 and 9 before 10: otherwise there would be an instant with all
signals blocked and nothing left to unblock them. The call is named as late as 5
so that one of a controller that died is never still to come while the thread is
in user code, in a handler that blocks, say: whoever has seen it there, or makes
it stop, knows that the call is over. 8 is there because the kernel
restarts an interrupted call only on its way out of a signal check, which a
system call's exit need not pass; the event stop is inside that check.

Limits, all only if we die between 2 and 10: a call with a restart block (-516)
answers EINTR, and a call that a signal should have ended is restarted when that
signal came in between; a seccomp filter is live again.
"""

from __future__ import annotations

import time

from optpoline.errors import (
    OptpolineError,
    ProcessGone,
    StopTimeout,
    TargetFault,
)
from optpoline.process.injection_code import InjectionCode
from optpoline.process.memory import RemoteMemory, store_data
from optpoline.process.own_stack import is_own_stack
from optpoline.process.procfs import (
    RUNS_NO_CODE,
    read_maps_around,
    read_seccomp_mode,
    read_state_char,
)
from optpoline.process.ptrace import StopCode, Tracer
from optpoline.x86.registers import Registers
from optpoline.x86.signal_frame import encode_signal_frame
from optpoline.x86.syscalls import (
    ERESTART_RESTARTBLOCK,
    ERESTARTSYS,
    SYS_GETPID,
    undisturbed,
)

__all__ = ["InjectionThread", "wait_for_stop"]

_ALL_SIGNALS = (1 << 64) - 1
_FIRST_POLL_S = 10e-6
_MAX_POLL_S = 200e-6
_ARGUMENTS_SIZE = 256
"""Bytes below the prepared stack for arguments passed by address."""

_CHECK_ALIVE_NS = 1_000_000
_MAX_STOPS_PER_CALL = 64  # stop signals that may come in between; each costs two stops


def wait_for_stop(tracer: Tracer, pid: int, tid: int, deadline_ns: int) -> StopCode | None:
    """Wait until a tracee has stopped; None when the deadline passed.

    Raises:
        ProcessGone: if it exited.
    """
    pause_s, checked_ns = _FIRST_POLL_S, time.monotonic_ns()
    while (code := tracer.poll(tid)) is None:
        now_ns = time.monotonic_ns()
        if now_ns >= deadline_ns:
            return None
        if now_ns - checked_ns > _CHECK_ALIVE_NS:
            # A dead thread group leader is not reported while other threads live.
            checked_ns = now_ns
            if read_state_char(pid, tid) in RUNS_NO_CODE:
                raise ProcessGone(tid)
        # A sleep, not a spin: at real-time priority we could keep the very thread
        # we wait for off its CPU.
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, _MAX_POLL_S)
    return code


class InjectionThread:
    """One stopped thread that runs system calls for us: enter, call ..., leave.

    Between ``enter`` and the end of ``leave`` the thread must not be detached;
    if that fails (``is_entered`` stays true), let the tracer thread end instead.

    Args:
        tracer: The tracer that stopped the thread.
        memory: Its memory.
        code: What ``find_injection_code`` found.
        pid: Its process.
        tid: The thread, at an event stop.
        regs: Its registers.
    """

    def __init__(
        self,
        tracer: Tracer,
        memory: RemoteMemory,
        code: InjectionCode,
        *,
        pid: int,
        tid: int,
        regs: Registers,
    ) -> None:
        """Keep what is needed; nothing is touched yet."""
        self._tracer = tracer
        self._memory = memory
        self._code = code
        self._pid = pid
        self.tid = tid
        self._regs = regs
        self._mask = 0
        self._rsp = 0
        self._rbp = regs.rbp
        self._is_masked = False
        self._is_stopped = True
        self._saved = (0, b"")
        self.is_entered = False

    def enter(self) -> None:
        """Prepare the way back (step 1).

        On error: the thread is as it was, but for bytes below its red zone.

        Raises:
            TargetFault: if there is no room on a stack of its own: choose another thread.
            UnsupportedTarget: if seccomp may forbid the calls: choose another thread.
        """
        # Each thread has filters of its own.
        if read_seccomp_mode(self._pid, self.tid):
            self._tracer.suspend_seccomp(self.tid)
        self._mask = self._tracer.read_signal_mask(self.tid)
        frame = encode_signal_frame(
            regs=undisturbed(self._regs),
            xstate=self._tracer.read_xstate(self.tid),
            mask=self._mask,
            trampoline_addr=self._code.trampoline_addr,
            layout=self._code.xsave_layout,
        )
        self._rsp, rbp = self._code.path.stack_for(frame.addr)
        self._rbp = self._regs.rbp if rbp is None else rbp
        low = self._rsp - _ARGUMENTS_SIZE
        size = frame.addr + len(frame.data) - low
        if not is_own_stack(read_maps_around(self._pid, low + size), low, low + size):
            raise TargetFault(low, size, pid=self._pid)
        # A coroutine's stack may lie there all the same, as a local array.
        try:
            self._saved = (low, self._memory.read(low, size))
        except TargetFault:
            self._saved = (low, bytes(size))  # the main stack, which grows by our write
        # 1. As the thread itself could write: a guard page must fault here, not later.
        store_data(self.tid, self._rsp, bytes(frame.addr - self._rsp) + frame.data)

    def call(self, nr: int, *args: int | bytes, deadline_ns: int) -> int:
        """Run one system call and return its result, negative for an error number.

        Args:
            nr: Number of the call.
            args: Up to six arguments; bytes are put on its stack and passed by address.
            deadline_ns: time.monotonic_ns() at which to give up.

        Raises:
            ProcessGone: if the thread was killed.
            StopTimeout: if the call did not come back in time; ``leave`` still may.
        """
        regs = self._regs.with_call(
            insn_addr=self._code.path.syscall_addr,
            sp=self._rsp,
            nr=SYS_GETPID,
            args=self._store_arguments(args),
        )
        regs = regs._replace(rbp=self._rbp)
        # 2. Before 3: the frame is what will unblock signals should we die.
        self._tracer.write_registers(self.tid, regs)
        self.is_entered = True
        if not self._is_masked:
            # 3. So that no signal is dequeued in between: its siginfo would be ours to keep.
            self._tracer.write_signal_mask(self.tid, _ALL_SIGNALS)
            self._is_masked = True
        # 4. Until the entry stop it is a call that does nothing.
        self._go_on_to_syscall_stop(deadline_ns)
        # 5. From here on the thread is in the kernel until it has made the call.
        self._tracer.write_syscall_number(self.tid, nr)
        # 6. The exit stop.
        self._go_on_to_syscall_stop(deadline_ns)
        result = self._tracer.read_registers(self.tid).result
        if -ERESTART_RESTARTBLOCK <= result <= -ERESTARTSYS:
            # A stop signal came while it slept in the call: make the call again.
            return self.call(nr, *args, deadline_ns=deadline_ns)
        return result

    def _store_arguments(self, args: tuple[int | bytes, ...]) -> tuple[int, ...]:
        """Put bytes below the prepared stack; signals are blocked while the call runs."""
        addr = self._rsp
        values: list[int] = []
        for arg in args:
            if isinstance(arg, bytes):
                addr -= -(-len(arg) // 16) * 16
                if self._rsp - addr > _ARGUMENTS_SIZE:
                    raise OptpolineError(f"arguments of more than {_ARGUMENTS_SIZE} bytes")
                store_data(self.tid, addr, arg)
                values.append(addr)
            else:
                values.append(arg)
        return tuple(values)

    def leave(self, *, deadline_ns: int) -> None:
        """Put the thread back to where it was, still stopped.

        Raises:
            ProcessGone: if it was killed.
            StopTimeout: if it did not stop in time.
        """
        if not self.is_entered:
            return
        # 8. To the event stop, where a pending restart is honoured. One that has not
        # stopped for a call (frozen by its control group, say) comes there by itself.
        self._tracer.interrupt(self.tid)
        if self._is_stopped:
            self._tracer.cont(self.tid)
        for _ in range(_MAX_STOPS_PER_CALL):
            code = self._wait(deadline_ns)
            if code.is_event_stop:
                break
            self._tracer.cont(self.tid, code.delivered_signal)
        else:
            raise OptpolineError(f"thread {self.tid} is flooded with stop signals")
        # 9. Before 10: from here to there the frame still brings the mask back.
        self._tracer.write_signal_mask(self.tid, self._mask)
        # 10. With the restart it had pending, if any.
        self._tracer.write_registers(self.tid, self._regs)
        self.is_entered = self._is_masked = False
        # The frame is needed no more: put back what it lay over.
        store_data(self.tid, *self._saved)

    def _go_on_to_syscall_stop(self, deadline_ns: int) -> None:
        """Let the thread go on to the next entry or exit of a system call."""
        signal = 0
        for _ in range(_MAX_STOPS_PER_CALL):
            self._tracer.cont_to_syscall(self.tid, signal)
            self._is_stopped = False
            code = self._wait(deadline_ns)
            if code.is_syscall_stop:
                return
            # SIGSTOP cannot be blocked. It is passed on from its own stop; the group
            # stop it begins is stepped over here and taken up again at the detach.
            signal = code.delivered_signal
        raise OptpolineError(f"thread {self.tid} is flooded with stop signals")

    def _wait(self, deadline_ns: int) -> StopCode:
        """Wait for the next stop."""
        begin_ns = time.monotonic_ns()
        code = wait_for_stop(self._tracer, self._pid, self.tid, deadline_ns)
        if code is None:
            waited_ns = time.monotonic_ns() - begin_ns
            raise StopTimeout(waited_ns, (self.tid,), pid=self._pid)
        self._is_stopped = True
        return code
