# SPDX-License-Identifier: Apache-2.0
"""A thin layer over ptrace(2).

The kernel ties a tracee to one *thread* of the tracer: all requests come from
the OS thread that made the ``Tracer``, and when that thread ends the kernel
lets go of every tracee, whatever state it is in.

Three choices make our own death harmless at any instant:

* PTRACE_O_TRACESYSGOOD. A tracee in a system call stop whose tracer dies sends
  itself the stop's code as a signal (ptrace_report_syscall). Plain that is
  SIGTRAP, which kills; with the option it is 0x85, no signal at all.
* Stops are looked at, not consumed (WNOWAIT). Consuming clears the code, and a
  signal in its delivery stop would be lost with us.
* No single-step, no breakpoint, no PTRACE_O_EXITKILL.
"""

from __future__ import annotations

import ctypes
import errno
import os
import threading

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone, UnsupportedTarget
from optpoline.x86.registers import REGISTERS_SIZE, Registers, decode_registers

__all__ = ["PTRACE_EVENT_STOP", "SYSCALL_STOP", "StopCode", "Tracer", "reap_thread"]

# include/uapi/linux/ptrace.h
_PTRACE_POKEUSR = 6
_PTRACE_CONT = 7
_PTRACE_DETACH = 17
_PTRACE_SYSCALL = 24
_PTRACE_SETOPTIONS = 0x4200
_PTRACE_GETREGSET = 0x4204
_PTRACE_SETREGSET = 0x4205
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_PTRACE_GETSIGMASK = 0x420A
_PTRACE_SETSIGMASK = 0x420B
_PTRACE_GET_RSEQ_CONFIGURATION = 0x420F
_PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG = 0x4211
_PTRACE_O_TRACESYSGOOD = 1
_PTRACE_O_SUSPEND_SECCOMP = 1 << 21
PTRACE_EVENT_STOP = 128
# arch/x86/include/uapi/asm/ptrace-abi.h
_ORIG_RAX_OFF = 120
# include/uapi/linux/elf.h
_NT_PRSTATUS = 1
_NT_X86_XSTATE = 0x202
_NT_X86_SHSTK = 0x204
# include/uapi/linux/prctl.h
_PR_SYS_DISPATCH_OFF = 0
# include/uapi/linux/wait.h
_WALL = 0x40000000

_EXIT_CODES = (os.CLD_EXITED, os.CLD_KILLED, os.CLD_DUMPED)
_SIGSET_SIZE = 8
_MAX_XSTATE_SIZE = 1 << 16  # AMX needs 11,008 bytes; room for what comes
SYSCALL_STOP = 0x85
"""What a stop at the entry or exit of a system call reports: SIGTRAP | 0x80."""


class _IoVec(ctypes.Structure):
    """Struct iovec."""

    _fields_ = (("base", ctypes.c_void_p), ("size", ctypes.c_size_t))


class _RseqConfiguration(ctypes.Structure):
    """Struct ptrace_rseq_configuration."""

    _fields_ = (
        ("rseq_abi_pointer", ctypes.c_uint64),
        ("rseq_abi_size", ctypes.c_uint32),
        ("signature", ctypes.c_uint32),
        ("flags", ctypes.c_uint32),
        ("pad", ctypes.c_uint32),
    )


class _DispatchConfiguration(ctypes.Structure):
    """Struct ptrace_sud_config."""

    _fields_ = (
        ("mode", ctypes.c_uint64),
        ("selector", ctypes.c_uint64),
        ("offset", ctypes.c_uint64),
        ("size", ctypes.c_uint64),
    )


def _load_ptrace(library: ctypes.CDLL) -> ctypes._NamedFuncPointer:
    """Return ptrace(2) of a loaded C library."""
    function = library.ptrace
    function.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
    function.restype = ctypes.c_long
    return function


class StopCode(int):
    """Why a thread stopped, as wait reports it: signal in the low byte, event above."""

    __slots__ = ()

    @property
    def is_event_stop(self) -> bool:
        """Whether it is the trap we asked for, or a group stop."""
        return self >> 8 == PTRACE_EVENT_STOP

    @property
    def is_syscall_stop(self) -> bool:
        """Whether it is the entry or exit of a system call."""
        return self == SYSCALL_STOP

    @property
    def delivered_signal(self) -> int:
        """The signal that is being delivered, 0 at any other stop."""
        return 0 if self >> 8 or self == SYSCALL_STOP else int(self)


class Tracer:
    """The ptrace requests, from one OS thread."""

    def __init__(self) -> None:
        """Bind to the calling OS thread."""
        self._ident = threading.get_ident()
        # Without letting go of the interpreter lock: a request takes a microsecond, and
        # another thread of ours could keep the lock for a whole switch interval while
        # the target stands.
        self._ptrace = _load_ptrace(ctypes.PyDLL(None, use_errno=True))
        # PTRACE_SEIZE alone can block, see Stopper.reap_dead.
        self._blocking_ptrace = _load_ptrace(ctypes.CDLL(None, use_errno=True))
        # Made once: of a stop of a thousand threads they would take milliseconds.
        self._registers = ctypes.create_string_buffer(REGISTERS_SIZE)
        self._registers_iovec = _IoVec()
        self._registers_iovec_addr = ctypes.addressof(self._registers_iovec)

    def seize(self, tid: int) -> None:
        """Begin to trace a thread without stopping it.

        Raises:
            ProcessGone: if it does not exist, or is exiting.
            PermissionDenied: if we may not, or another tracer does.
        """
        self._request(_PTRACE_SEIZE, tid, 0, _PTRACE_O_TRACESYSGOOD)

    def interrupt(self, tid: int) -> None:
        """Ask a thread to stop, or a stopped one to stop again when it is let go on."""
        self._request(_PTRACE_INTERRUPT, tid)

    def cont(self, tid: int, signal: int = 0) -> None:
        """Let a stopped thread go on, delivering a signal."""
        self._request(_PTRACE_CONT, tid, 0, signal)

    def cont_to_syscall(self, tid: int, signal: int = 0) -> None:
        """Let a stopped thread go on to the next entry or exit of a system call."""
        self._request(_PTRACE_SYSCALL, tid, 0, signal)

    def detach(self, tid: int, signal: int = 0) -> None:
        """Let go of a stopped thread; a signal is passed on from its delivery stop."""
        self._request(_PTRACE_DETACH, tid, 0, signal)

    def suspend_seccomp(self, tid: int) -> None:
        """Switch a stopped thread's seccomp filters off while it is traced.

        Raises:
            UnsupportedTarget: if the kernel does not let us.
        """
        options = _PTRACE_O_TRACESYSGOOD | _PTRACE_O_SUSPEND_SECCOMP
        try:
            self._request(_PTRACE_SETOPTIONS, tid, 0, options)
        except (PermissionDenied, OptpolineError) as error:
            if isinstance(error, ProcessGone):
                raise
            raise UnsupportedTarget(
                f"thread {tid} runs under seccomp, which may forbid the calls we need",
                hint="run optpoline as root, unconfined, to suspend its filter meanwhile",
            ) from error

    def read_registers(self, tid: int) -> Registers:
        """Return a stopped thread's general registers.

        Raises:
            UnsupportedTarget: if it is a 32-bit thread.
        """
        self._registers_iovec.base = ctypes.addressof(self._registers)
        self._registers_iovec.size = REGISTERS_SIZE
        self._request(_PTRACE_GETREGSET, tid, _NT_PRSTATUS, self._registers_iovec_addr)
        if self._registers_iovec.size != REGISTERS_SIZE:
            raise UnsupportedTarget(f"thread {tid} is not a 64-bit x86 thread")
        return decode_registers(self._registers.raw)

    def write_registers(self, tid: int, regs: Registers) -> None:
        """Set a stopped thread's general registers."""
        data = ctypes.create_string_buffer(regs.encode(), REGISTERS_SIZE)
        iovec = _IoVec(ctypes.addressof(data), REGISTERS_SIZE)
        self._request(_PTRACE_SETREGSET, tid, _NT_PRSTATUS, ctypes.addressof(iovec))

    def write_syscall_number(self, tid: int, nr: int) -> None:
        """Have a thread at the entry stop of a system call make another one instead."""
        self._request(_PTRACE_POKEUSR, tid, _ORIG_RAX_OFF, nr)

    def read_xstate(self, tid: int) -> bytes:
        """Return a stopped thread's XSAVE image, in the standard format."""
        return self._read_regset(tid, _NT_X86_XSTATE, _MAX_XSTATE_SIZE)

    def has_shadow_stack(self, tid: int) -> bool:
        """Say whether a stopped thread has a hardware shadow stack."""
        try:
            self._read_regset(tid, _NT_X86_SHSTK, 8)
        except ProcessGone:
            raise
        except OptpolineError:
            return False  # ENODEV: switched off; EINVAL: the kernel knows of none
        return True

    def has_syscall_dispatch(self, tid: int) -> bool:
        """Say whether a stopped thread may have its system calls turned into SIGSYS.

        It is so with prctl(PR_SET_SYSCALL_USER_DISPATCH), as the byte says that the thread has
        chosen for that. False before Linux 6.4, which tells nobody (5.11 has the prctl).
        """
        config = _DispatchConfiguration()
        size, request = ctypes.sizeof(config), _PTRACE_GET_SYSCALL_USER_DISPATCH_CONFIG
        try:
            self._request(request, tid, size, ctypes.addressof(config))
        except ProcessGone:
            raise
        except OptpolineError:
            return False
        return bool(config.mode != _PR_SYS_DISPATCH_OFF)

    def read_signal_mask(self, tid: int) -> int:
        """Return a stopped thread's blocked signals, signal n in bit n-1."""
        mask = ctypes.c_uint64()
        self._request(_PTRACE_GETSIGMASK, tid, _SIGSET_SIZE, ctypes.addressof(mask))
        return mask.value

    def write_signal_mask(self, tid: int, mask: int) -> None:
        """Set a stopped thread's blocked signals."""
        value = ctypes.c_uint64(mask)
        self._request(_PTRACE_SETSIGMASK, tid, _SIGSET_SIZE, ctypes.addressof(value))

    def read_rseq_area(self, tid: int) -> tuple[int, int]:
        """Return where a stopped thread's struct rseq is, and its signature; (0, 0) for none."""
        config = _RseqConfiguration()
        size = ctypes.sizeof(config)
        try:
            self._request(_PTRACE_GET_RSEQ_CONFIGURATION, tid, size, ctypes.addressof(config))
        except ProcessGone:
            raise
        except OptpolineError:
            return 0, 0  # before Linux 5.13, or built without rseq
        return int(config.rseq_abi_pointer), int(config.signature)

    def poll(self, tid: int) -> StopCode | None:
        """Return why a tracee has stopped, or None while it has not.

        The stop is left to be seen again. An exit is never reaped here: if the
        tracee is our own child, its status belongs to whoever started it.

        Raises:
            ProcessGone: if it has exited or is not our tracee any more.
        """
        flags = os.WSTOPPED | os.WEXITED | os.WNOHANG | os.WNOWAIT | _WALL
        try:
            result = os.waitid(os.P_PID, tid, flags)
        except ChildProcessError as error:
            raise ProcessGone(tid) from error
        if result is None:
            return None
        if result.si_code in _EXIT_CODES:
            raise ProcessGone(tid)
        return StopCode(result.si_status)

    def _read_regset(self, tid: int, kind: int, max_size: int) -> bytes:
        """Read a register set of at most max_size bytes."""
        data = ctypes.create_string_buffer(max_size)
        iovec = _IoVec(ctypes.addressof(data), max_size)
        self._request(_PTRACE_GETREGSET, tid, kind, ctypes.addressof(iovec))
        return ctypes.string_at(data, iovec.size)

    def _request(self, request: int, tid: int, addr: int = 0, data: int = 0) -> None:
        """Make one request; turn its error into one of ours."""
        if threading.get_ident() != self._ident:
            raise OptpolineError("a ptrace request was made by another thread than the tracer's")
        ptrace = self._blocking_ptrace if request == _PTRACE_SEIZE else self._ptrace
        if ptrace(request, tid, addr, data) != -1:
            return
        number = ctypes.get_errno()
        cause = OSError(number, os.strerror(number))
        if number == errno.ESRCH:
            raise ProcessGone(tid) from cause
        if number == errno.EPERM:
            raise PermissionDenied(
                f"thread {tid} cannot be traced: it is exiting, traced by another, or not ours"
            ) from cause
        raise OptpolineError(
            f"ptrace request {request:#x} on thread {tid} failed: {cause.strerror}"
        ) from cause


def reap_thread(tid: int) -> None:
    """Reap a traced thread if it is dead; harmless if not. From any thread of ours.

    Not for the first thread of a process: its exit status belongs to its parent.
    """
    flags = os.WEXITED | os.WNOHANG | _WALL
    try:
        # Look first: a stop of a tracee is reported even when only exits are asked
        # for, and would be consumed under the eyes of the tracer thread.
        result = os.waitid(os.P_PID, tid, flags | os.WNOWAIT)
        if result is not None and result.si_code in _EXIT_CODES:
            os.waitid(os.P_PID, tid, flags)
    except ChildProcessError:
        return
