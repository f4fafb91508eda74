# SPDX-License-Identifier: Apache-2.0
"""What callers of the API hand in, checked before anything is done."""

from __future__ import annotations

import math
import operator
from contextlib import suppress
from typing import Literal, SupportsFloat, SupportsIndex, get_args

from optpoline.errors import UsageError

__all__ = [
    "CHANGES",
    "LEARN_S",
    "MAX_SETTING",
    "Change",
    "validate_change",
    "validate_pid",
    "validate_setting",
]

Change = Literal["swap", "switch-off"]
"""How a promoted site is changed (``Config.change``)."""

CHANGES: tuple[Change, ...] = get_args(Change)

LEARN_S = 1.0
"""Length of the first learning window of who sets none, seconds."""

MAX_SETTING = 1e9
"""The largest number that a setting may have: 31 years, where it is in seconds. In
nanoseconds it still fits the 64 bits of the kernel's."""


def validate_pid(pid: object) -> int:
    """Return a process id, if it is one; whether there is such a process is not asked.

    Raises:
        UsageError: if it is no whole number from 1 up.

    >>> validate_pid(4711)
    4711
    """
    # True is a number to Python, and would be init.
    if isinstance(pid, SupportsIndex) and not isinstance(pid, bool):
        number = operator.index(pid)
    else:
        number = 0
    if number <= 0:
        raise UsageError(f"{pid!r} is not a process id", hint="those are whole numbers from 1 up")
    return number


def validate_setting(name: str, value: object) -> None:
    """Check a length of time, or another number of which there can be none or some.

    Args:
        name: What it is called.
        value: What the caller has set.

    Raises:
        UsageError: if it is no number from 0 to ``MAX_SETTING``.

    >>> validate_setting("learn_s", 0.5)
    """
    number = math.nan  # which is in no range
    if isinstance(value, SupportsFloat) and not isinstance(value, bool):
        with suppress(OverflowError):
            number = float(value)
    if not 0 <= number <= MAX_SETTING:
        raise UsageError(f"{name} is {value!r}, not a number from 0 to {MAX_SETTING:.0f}")


def validate_change(value: object) -> None:
    """Check a way to change promoted sites.

    Raises:
        UsageError: if there is no such way.

    >>> validate_change("switch-off")
    """
    if value not in CHANGES:
        raise UsageError(f"change is {value!r}, not {' or '.join(map(repr, CHANGES))}")
