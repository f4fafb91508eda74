# SPDX-License-Identifier: Apache-2.0
"""Tell whether what lies below a stack pointer is that stack's own.

A frame that is put below a thread's red zone takes up to some 12 KiB, more than the
kernel's own (x86/signal_frame.py). Below an alternate stack of 8 KiB in static memory, or
a coroutine's in the heap, that is other data of the program, which others of its threads
may read meanwhile and which nobody would put back if we died.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence

from optpoline.model import Mapping

__all__ = ["MAX_STACK_SIZE", "is_own_stack", "is_thread_stack"]

MAX_STACK_SIZE = 64 << 20
"""Bytes of a mapping above a guard page that still counts as one stack, not as an arena of many."""


def is_thread_stack(mapping: Mapping, below: Mapping | None) -> bool:
    """Tell whether a mapping is a stack as a thread has it: the main one, or above a guard page.

    Args:
        mapping: The mapping.
        below: The one before it, in address order.
    """
    has_guard = (
        below is not None
        and below.end == mapping.start
        and below.perms.startswith("---")
        and mapping.size <= MAX_STACK_SIZE
    )
    return mapping.path == "[stack]" or has_guard


def is_own_stack(maps: Sequence[Mapping], low: int, high: int) -> bool:
    """Tell whether ``low`` to ``high`` is the main stack, or lies above a guard page.

    The main stack may still have to grow for it. What cannot be told: a coroutine's stack
    that is a local array inside of either.

    Args:
        maps: All mappings of the program, in address order.
        low: First address.
        high: Address after the last, in a mapping.
    """
    at = bisect.bisect_left([int(mapping.end) for mapping in maps], high)
    if at == len(maps) or maps[at].start >= high:
        return False
    mapping, below = maps[at], maps[at - 1] if at else None
    if mapping.path == "[stack]":
        return below is None or low >= below.end
    return is_thread_stack(mapping, below) and low >= mapping.start
