# SPDX-License-Identifier: Apache-2.0
"""Tell whether the code at a learned target still needs the register that led there.

Where it does not, a block may leave another value in it (``BlockPlan.base``). Unlike
the flags, which a miss loses too, the register is put right on the miss path: so only
targets that a block has guards for are asked about.
"""

from __future__ import annotations

from optpoline.discover.image import ModuleImage
from optpoline.model import Addr
from optpoline.x86.liveness import WHOLE_REGISTER, RegisterFate, run_register

__all__ = ["operand_dead_at"]

_MAX_RUNS = 64
"""Runs of code followed from one target before it counts as live: compiled code writes
a scratch register within a few."""

_MAX_RUN_SIZE = 512
"""Bytes of one run looked at, likewise."""


def operand_dead_at(image: ModuleImage, addr: Addr, register: str) -> bool:
    """Say whether nothing depends on a register's value at an address.

    Branches and calls are followed; at a return, or where a jump to a thunk or a static call
    leads who knows where, every register is live.

    Args:
        image: The module that the address is in.
        addr: A target of an indirect branch.
        register: The 64-bit name of the register that held ``addr``.
    """
    ends = image.changeable.calls | {thunk.addr for thunk in image.thunks.thunks}
    start = (addr, WHOLE_REGISTER)
    todo, seen = [start], {start}
    while todo:
        run_addr, pending = todo.pop()
        text = image.text_at(run_addr)
        if text is None or run_addr in ends or len(seen) > _MAX_RUNS:
            return False
        code = text.code_at(run_addr, _MAX_RUN_SIZE)
        run = run_register(code, run_addr, register, pending, image.changeable.forks)
        if run.fate is RegisterFate.LIVE:
            return False
        ahead = [(successor, run.pending) for successor in run.successors]
        todo += [state for state in ahead if state not in seen]
        seen.update(ahead)
    return True
