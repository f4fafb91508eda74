# SPDX-License-Identifier: Apache-2.0
"""What callers of the API hand in, checked before anything is done."""

from __future__ import annotations

import operator
from typing import SupportsIndex

from optpoline.errors import UsageError

__all__ = ["validate_pid"]


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
