# SPDX-License-Identifier: Apache-2.0
"""How much a sleeping thread would notice of being woken by a stop.

The kernel tells its call and the arguments; ``x86/syscalls.py`` knows what these say. What
they do not say takes more than a look, which no stop waits for.
"""

from __future__ import annotations

from optpoline.process.busy import is_transferring
from optpoline.process.socket_timeouts import may_time_out
from optpoline.process.thread_state import ThreadState, ThreadWhere
from optpoline.x86.syscalls import Disturbance, has_temporary_mask, may_receive, rank_disturbance

__all__ = ["may_wait_afresh", "rank_waking"]


def rank_waking(pid: int, state: ThreadState) -> Disturbance:
    """Say how much a sleeping thread would notice of being woken."""
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
    return rank_disturbance(state.syscall_nr, state.syscall_args)


def may_wait_afresh(pid: int, state: ThreadState) -> bool:
    """Tell whether a timeout of a sleeping thread would begin again if it were woken.

    Args:
        pid: Its process.
        state: Where it sleeps, in a system call.
    """
    rank = rank_disturbance(state.syscall_nr, state.syscall_args)
    if rank is Disturbance.TIMEOUT_AFRESH:
        return True
    return may_receive(state.syscall_nr) and may_time_out(pid, state.tid, state.syscall_args[0])
