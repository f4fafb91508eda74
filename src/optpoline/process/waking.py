# SPDX-License-Identifier: Apache-2.0
"""How much a sleeping thread would notice of being woken by a stop."""

from __future__ import annotations

from optpoline.process.busy import is_transferring
from optpoline.process.thread_state import ThreadState, ThreadWhere
from optpoline.x86.syscalls import Disturbance, has_temporary_mask, rank_disturbance

__all__ = ["rank_waking"]


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
