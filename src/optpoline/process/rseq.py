# SPDX-License-Identifier: Apache-2.0
"""Where the threads of a program have registered restartable sequences (rseq).

A thread tells the kernel once where its ``struct rseq`` is (include/uapi/linux/rseq.h)::

    +0    u32  cpu_id_start    CPU it runs on; 0 while not registered
    +4    u32  cpu_id          the same; below 0 (signed) while not registered
    +8    u64  rseq_cs         the critical section it is in, or 0
    +16   ...                  not used here

C libraries keep it at one distance from the thread pointer (%fs) in all threads, which is
what blocks need to know. They *write* there, so it must be that distance in every thread:
when in doubt there is none, and blocks count with locked instructions instead.

Doubtful are threads that disagree; two with one thread pointer (a process made by
``clone(CLONE_VM)`` has that of the thread that made it, and the kernel keeps the area up to
date for one of them only); a thread without a registration whose memory at that
distance does not look like an area that was never registered; and a single thread whose
area is far from its thread pointer, in memory that was perhaps allocated for it alone.
A thread that has not run yet proves nothing: a C library registers before all else.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.errors import TargetFault
from optpoline.model import Addr, RseqAbi
from optpoline.process.memory import Memory

__all__ = ["RSEQ_CS_OFF", "RseqRegistration", "choose_rseq_abi", "find_rseq_holders"]

RSEQ_CS_OFF = 8
"""Offset of ``rseq_cs`` in ``struct rseq``."""

_CPU_ID_OFF = 4
_AREA_ALIGNMENT = 32
_NEAR_SIZE = 1 << 16
"""Distance up to which one thread is believed alone: glibc 2.36 has its area 2,464 bytes
above the thread pointer, later ones before it, among the first of the thread's variables."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RseqRegistration:
    """What a stopped thread has told the kernel.

    Attributes:
        tid: The thread.
        thread_pointer: Its %fs base.
        area_addr: Its ``struct rseq``; 0 where it has registered none.
        signature: u32 before each abort handler.
        is_newborn: Whether it is a thread that has not run yet: it has had no time to.
    """

    tid: int
    thread_pointer: int
    area_addr: int
    signature: int
    is_newborn: bool = False

    @property
    def offset(self) -> int:
        """Distance of the area from the thread pointer."""
        return self.area_addr - self.thread_pointer


def choose_rseq_abi(registrations: Sequence[RseqRegistration], memory: Memory) -> RseqAbi | None:
    """Return where blocks find the area of every thread; None where they must not use it.

    Target state: the threads of ``registrations`` stand.

    Args:
        registrations: Of the threads that stand, one at least.
        memory: The target's.
    """
    registrations = [one for one in registrations if one.area_addr or not one.is_newborn]
    registered = [one for one in registrations if one.area_addr]
    found = {(one.offset, one.signature) for one in registered}
    if len(found) != 1:
        return None
    ((offset, signature),) = found
    pointers = {one.thread_pointer for one in registered}
    if not -(1 << 31) <= offset < 1 << 31 or registered[0].area_addr % _AREA_ALIGNMENT:
        return None
    if len(pointers) == 1 and abs(offset) > _NEAR_SIZE:
        return None
    others = {one.thread_pointer for one in registrations} - pointers
    if len(pointers) + len(others) != len(registrations):
        return None  # who is on the CPU that the shared area tells of?
    if not all(_is_unregistered_area(memory, pointer + offset) for pointer in others):
        return None
    return RseqAbi(offset=offset, signature=signature)


def _is_unregistered_area(memory: Memory, addr: int) -> bool:
    """Tell whether memory looks like an area that its thread has not registered."""
    try:
        (cpu_id,) = struct.unpack("<i", memory.read(addr + _CPU_ID_OFF, 4))
    except TargetFault:
        return False
    return bool(cpu_id < 0)


def find_rseq_holders(
    registrations: Sequence[RseqRegistration],
    memory: Memory,
    ranges: Sequence[tuple[Addr, Addr]],
) -> tuple[int, ...]:
    """Return the threads whose ``rseq_cs`` points into one of these ranges.

    The kernel follows that pointer whenever it comes by, long after the section perhaps,
    and kills the thread if there is no descriptor any more.
    """
    holders: list[int] = []
    for one in registrations:
        if not one.area_addr:
            continue
        try:
            (addr,) = struct.unpack("<Q", memory.read(one.area_addr + RSEQ_CS_OFF, 8))
        except TargetFault:
            continue  # its memory is gone: the kernel cannot follow it either
        if any(start <= addr < end for start, end in ranges):
            holders.append(one.tid)
    return tuple(holders)
