# SPDX-License-Identifier: Apache-2.0
"""How much a sleeping thread would notice of being woken by a stop.

The kernel tells its call and the arguments; ``x86/syscalls.py`` knows what these say. What
they do not say is asked of the file that the thread waits for (``process/receiving.py``).
"""

from __future__ import annotations

from optpoline.process.busy import is_transferring
from optpoline.process.receiving import rank_file, rank_receiving
from optpoline.process.thread_state import ThreadState, ThreadWhere
from optpoline.x86.syscalls import Disturbance, has_temporary_mask, may_receive, rank_disturbance

__all__ = ["rank_call", "rank_waking"]


def rank_waking(pid: int, state: ThreadState, *, asks: bool = False) -> Disturbance:
    """Say how much a thread that does not run may notice of being woken.

    Args:
        pid: Its process.
        state: Where it is.
        asks: As for ``rank_call``.
    """
    if state.where is ThreadWhere.IN_SYSCALL and state.state in "ST":
        return rank_call(pid, state, asks=asks)
    if state.state == "T":
        return Disturbance.NONE
    if state.where is ThreadWhere.RUNNING:
        # It has just woken by itself, or waits for a CPU.
        return Disturbance.HARMFUL if is_transferring(pid, state.tid) else Disturbance.NONE
    return Disturbance.HARMFUL


def rank_call(pid: int, state: ThreadState, *, asks: bool) -> Disturbance:
    """Say how much a thread may notice of being woken from the system call that it is in.

    Args:
        pid: Its process.
        state: Where it is: in a call. Its letter may say what was a moment ago.
        asks: Whether a socket or a terminal that it receives from is asked; if not, it is
            ``SOCKET_TIMEOUT_AFRESH`` whatever that is set to, and known in microseconds.
    """
    nr, args = state.syscall_nr, state.syscall_args
    if state.state == "T":
        # Stopped by job control: it has left its call already.
        return Disturbance.HARMFUL if has_temporary_mask(nr, args) else Disturbance.NONE
    rank = rank_disturbance(nr, args)
    if rank is Disturbance.RESTART_BLOCK and state.seccomp:
        # The filter might forbid the way back, so the call begins again (``begin_again``).
        return Disturbance.TIMEOUT_AFRESH
    if rank < Disturbance.HARMFUL and may_receive(nr):
        rank_by_file = rank_receiving if asks else rank_file
        return rank_by_file(pid, state.tid, args[0])
    return rank
