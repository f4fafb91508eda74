# SPDX-License-Identifier: Apache-2.0
"""How many CPUs there may be on this machine, those included that are not there yet."""

from __future__ import annotations

from pathlib import Path

__all__ = ["MAX_CPUS", "read_n_possible_cpus"]

MAX_CPUS = 8192
"""CPUs that Linux on x86-64 is built for at most (CONFIG_NR_CPUS with MAXSMP)."""

_POSSIBLE = Path("/sys/devices/system/cpu/possible")


def read_n_possible_cpus(path: Path = _POSSIBLE) -> int:
    """Return a number that the number of every CPU is below.

    Where the kernel does not tell (no sysfs), that is ``MAX_CPUS``: a thread that found
    its CPU's number above what was expected would count in somebody else's memory.

    Args:
        path: Where the kernel tells, as ranges such as "0-3,8-11".
    """
    try:
        ranges = path.read_text().strip()
        return int(ranges.replace("-", ",").rsplit(",", 1)[-1]) + 1
    except (OSError, ValueError):
        return MAX_CPUS
