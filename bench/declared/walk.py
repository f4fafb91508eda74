# SPDX-License-Identifier: Apache-2.0
"""What a running program executes in one round of a loop, seen by single steps.

Where a controller has changed the program no simulator of the file tells what is executed.
Here the program is ours and nothing depends on it: what a controller must never do to a program
of others, because of what becomes of it when the controller dies in a step, is no danger.
"""

from __future__ import annotations

import ctypes
import itertools
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from iced_x86 import Decoder, Formatter, FormatterSyntax

from bench.declared.program import Calls
from bench.errors import BenchError

__all__ = ["Executed", "walk_round"]

# include/uapi/linux/ptrace.h, arch/x86/include/uapi/asm/ptrace-abi.h, uapi/linux/wait.h
_PTRACE_PEEKUSER = 3
_PTRACE_SINGLESTEP = 9
_PTRACE_DETACH = 17
_PTRACE_SEIZE = 0x4206
_PTRACE_INTERRUPT = 0x4207
_RIP_OFF = 16 * 8
_RSP_OFF = 19 * 8
_WALL = 0x40000000

_ROUNDS = 4
_MAX_STEPS = 200_000
"""The C library takes some thousand to read a line and to print one."""

_LONGEST = 15


@dataclass(frozen=True, slots=True, kw_only=True)
class Executed:
    """One instruction that was executed.

    Attributes:
        addr: Where.
        code: Its bytes.
        text: What it says, as objdump would.
    """

    addr: int
    code: bytes
    text: str

    @property
    def mnemonic(self) -> str:
        """Its name without operands and prefixes of no effect."""
        words = self.text.split()
        return next(word for word in words if word not in ("cs", "notrack"))


def walk_round(calls: Calls, form: str) -> tuple[Executed, ...]:
    """Step through a form's loop; return what one round of it executes.

    Raises:
        BenchError: if its rounds differ.
    """
    loop_addr = calls.find_loop(form)
    with ThreadPoolExecutor(max_workers=1) as pool:
        with _stepping(calls.pid) as stepper:
            answer = pool.submit(calls.run, form, _ROUNDS)
            addrs = stepper.walk_function(loop_addr)
        answer.result()
    counts = Counter(addrs)
    begin = next((addr for addr in addrs if counts[addr] == _ROUNDS), None)
    places = [place for place, addr in enumerate(addrs) if addr == begin]
    rounds = [addrs[a:b] for a, b in itertools.pairwise(places)]
    if not rounds or rounds.count(rounds[0]) != len(rounds):
        raise BenchError(f"{form} does not execute the same each round")
    with Path(f"/proc/{calls.pid}/mem").open("rb", buffering=0) as memory:
        return tuple(_decode(memory.fileno(), addr) for addr in rounds[0])


def _decode(memory: int, addr: int) -> Executed:
    """Read and decode one instruction."""
    insn = Decoder(64, os.pread(memory, _LONGEST, addr), ip=addr).decode()
    text = Formatter(FormatterSyntax.GAS).format(insn)
    return Executed(addr=addr, code=os.pread(memory, insn.len, addr), text=text)


class _Stepper:
    """A thread of a child of ours that is traced by the calling OS thread."""

    def __init__(self, pid: int) -> None:
        """Remember which."""
        self._pid = pid
        self._ptrace = ctypes.CDLL(None, use_errno=True).ptrace
        self._ptrace.argtypes = (ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p)
        self._ptrace.restype = ctypes.c_long

    def request(self, request: int, addr: int = 0) -> int:
        """Make one request."""
        ctypes.set_errno(0)
        result = int(self._ptrace(request, self._pid, addr, 0))
        if error := ctypes.get_errno():
            raise BenchError(f"ptrace request {request:#x} failed: {os.strerror(error)}")
        return result & (1 << 64) - 1

    def wait_for_stop(self) -> None:
        """Wait until it stands still, for no other reason than our request."""
        _, status = os.waitpid(self._pid, _WALL)
        if not os.WIFSTOPPED(status) or os.WSTOPSIG(status) != signal.SIGTRAP:
            raise BenchError(f"the program ended or got a signal while stepped: {status:#x}")

    def step(self) -> int:
        """Execute one instruction; return the address of the next."""
        self.request(_PTRACE_SINGLESTEP)
        self.wait_for_stop()
        return self.request(_PTRACE_PEEKUSER, _RIP_OFF)

    def walk_function(self, addr: int) -> list[int]:
        """Go on until a function is entered; return what is executed until it returns."""
        for _ in range(_MAX_STEPS):
            if self.step() == addr:
                break
        else:
            raise BenchError("the loop is not entered")
        with Path(f"/proc/{self._pid}/mem").open("rb", buffering=0) as memory:
            at = self.request(_PTRACE_PEEKUSER, _RSP_OFF)
            return_addr = int.from_bytes(os.pread(memory.fileno(), 8, at), "little")
        addrs = [addr]
        while (now := self.step()) != return_addr:
            if len(addrs) > _MAX_STEPS:
                raise BenchError("the loop does not return")
            addrs.append(now)
        return addrs


@contextmanager
def _stepping(pid: int) -> Iterator[_Stepper]:
    """Trace a child of ours, stopped, for a block."""
    stepper = _Stepper(pid)
    stepper.request(_PTRACE_SEIZE)
    stepper.request(_PTRACE_INTERRUPT)
    stepper.wait_for_stop()
    try:
        yield stepper
    finally:
        # After an error it may be gone; and who waits for its answer has to get one.
        with suppress(BenchError):
            stepper.request(_PTRACE_DETACH)
