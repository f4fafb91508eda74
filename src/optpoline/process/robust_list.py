# SPDX-License-Identifier: Apache-2.0
"""Tell whether threads that sleep were made by the same C library as those that stand.

Where a thread's ``%fs`` points is told only of one that stands. Of the others the kernel tells
whoever may look at them where their list of robust futexes begins (get_robust_list(2)), and a C
library has that at one distance from ``%fs`` in all of its threads. One that was made in
another way, with memory of its own behind ``%fs``, has no such list, or one elsewhere. So has
a process made by ``clone(CLONE_VM)``, which begins without one.

Limit: tells nothing of threads that are made later.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterable, Sequence

from optpoline.errors import AttachError, TargetFault
from optpoline.process.memory import Memory
from optpoline.process.procfs import RUNS_NO_CODE, read_state_char
from optpoline.process.rseq import RseqRegistration

__all__ = ["are_made_alike", "read_robust_list"]

_SYS_GET_ROBUST_LIST = 274
_WORD_SIZE = 8

_libc = ctypes.CDLL(None, use_errno=True)


def read_robust_list(tid: int) -> int | None:
    """Return where a thread's list of robust futexes begins, 0 for none; None if not told."""
    head, size = ctypes.c_uint64(), ctypes.c_size_t()
    number = ctypes.c_long(_SYS_GET_ROBUST_LIST)
    if _libc.syscall(number, ctypes.c_int(tid), ctypes.byref(head), ctypes.byref(size)):
        return None  # gone, or a kernel without
    return head.value


def are_made_alike(
    standing: Iterable[RseqRegistration],
    sleepers: Sequence[tuple[int, int]],
    memory: Memory,
    read_list: Callable[[int], int | None] = read_robust_list,
) -> bool:
    """Tell whether threads that sleep have their memory laid out as those that stand.

    Args:
        standing: Threads that stand, of which those that have registered rseq count.
        sleepers: Those that do not: (pid, tid).
        memory: The program's.
        read_list: Asks the kernel.
    """
    if not sleepers:
        return True  # the program stands meanwhile: ask of nobody what nobody needs
    lists = {one.thread_pointer: read_list(one.tid) for one in standing if one.area_addr}
    distances = {head - pointer for pointer, head in lists.items() if head}
    for pid, tid in sleepers:
        head = read_list(tid)
        if head is None or (not head and _is_dead(pid, tid)):
            continue
        if not head or len(distances) != 1 or not _is_thread_pointer(memory, head - max(distances)):
            return False
    return True


def _is_dead(pid: int, tid: int) -> bool:
    """Tell whether a thread runs no code of the program any more, and so has no list either."""
    try:
        return read_state_char(pid, tid) in RUNS_NO_CODE
    except AttachError:
        return True


def _is_thread_pointer(memory: Memory, addr: int) -> bool:
    """Tell whether an address is what ``%fs`` may hold: the word there is the address itself."""
    try:
        return int.from_bytes(memory.read(addr, _WORD_SIZE), "little") == addr
    except TargetFault:
        return False
