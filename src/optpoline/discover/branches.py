# SPDX-License-Identifier: Apache-2.0
"""Tell which would-be branches of a text are instructions.

A scan of all byte offsets gives candidates; decoding from the last known
instruction boundary before them is the judge.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from optpoline.discover.image import ModuleImage
from optpoline.discover.text import Text
from optpoline.model import Addr
from optpoline.x86.decode import AddrArray, Insn, decode_ending_at

__all__ = ["decode_branches"]

_DISP_SIZE = 4


def decode_branches(image: ModuleImage, text: Text, ends: AddrArray) -> Iterator[Insn]:
    """Yield the instructions that end at given addresses, in address order.

    Args:
        image: The module.
        text: The text they are in.
        ends: Addresses after candidates of branches with a 32-bit displacement, ascending.
    """
    if ends.size == 0:
        return
    boundaries = image.functions.boundaries_before(ends - _DISP_SIZE - 1)
    starts = np.maximum(boundaries, text.addr)
    # Both ascend: what has the same boundary lies side by side.
    firsts = np.flatnonzero(np.diff(starts, prepend=-1))
    groups = np.split(ends, firsts[1:])
    for start, group in zip(starts[firsts].tolist(), groups, strict=True):
        wanted = group.tolist()
        code = text.code_at(start, wanted[-1] - start)
        yield from decode_ending_at(code, Addr(start), set(wanted))
