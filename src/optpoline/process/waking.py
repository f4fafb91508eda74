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

__all__ = ["rank_call_asked", "rank_waking"]


def rank_waking(pid: int, state: ThreadState) -> Disturbance:
    """Say how much a sleeping thread may notice of being woken; takes microseconds.

    Args:
        pid: Its process.
        state: Where it is.

    Returns:
        ``SOCKET_TIMEOUT_AFRESH`` for one that receives from a socket, whatever that is set to.
    """
    if state.state == "T":
        # Stopped by job control: it has left its call already.
        is_masked = state.where is ThreadWhere.IN_SYSCALL and has_temporary_mask(
            state.syscall_nr, state.syscall_args
        )
        return Disturbance.HARMFUL if is_masked else Disturbance.NONE
    if state.where is ThreadWhere.RUNNING:
        # It has just woken by itself, or waits for a CPU.
        return Disturbance.HARMFUL if is_transferring(pid, state.tid) else Disturbance.NONE
    if state.state != "S" or state.where is not ThreadWhere.IN_SYSCALL:
        return Disturbance.HARMFUL
    return _rank_call(pid, state)


def rank_call_asked(pid: int, state: ThreadState) -> Disturbance:
    """Say how much a thread would notice that is woken from the call that it sleeps in.

    Other than ``rank_waking`` this asks a socket that it receives from, and takes no notice of
    the state letter, which says what was a moment ago.

    Args:
        pid: Its process.
        state: Where it is: in a call.
    """
    rank = _rank_call(pid, state)
    if rank is Disturbance.SOCKET_TIMEOUT_AFRESH:
        return rank_receiving(pid, state.tid, state.syscall_args[0])
    return rank


def _rank_call(pid: int, state: ThreadState) -> Disturbance:
    """Say how much may be noticed of the end of a call, by its arguments and its file."""
    rank = rank_disturbance(state.syscall_nr, state.syscall_args)
    if rank is Disturbance.RESTART_BLOCK and state.seccomp:
        # The filter might forbid the way back, so the call begins again (``begin_again``).
        return Disturbance.TIMEOUT_AFRESH
    if rank < Disturbance.HARMFUL and may_receive(state.syscall_nr):
        return max(rank, rank_file(pid, state.tid, state.syscall_args[0]))
    return rank
