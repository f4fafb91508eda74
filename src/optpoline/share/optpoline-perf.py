# SPDX-License-Identifier: Apache-2.0
"""Let perf name samples inside optpoline's blocks, in a profile recorded before.

    python3 optpoline-perf.py perf.data         change the file in place
    python3 optpoline-perf.py <in >out          or as a filter

perf looks for names in ``/tmp/perf-PID.map`` only for code in anonymous memory (and
so finds none for code that any compiler keeps in a memfd). This gives the mappings
of arenas that name in the profile; each record keeps its size. It stands alone.
"""

from __future__ import annotations

import sys
from pathlib import Path

__all__ = ["main", "rename_arenas"]

ARENA_PATH = b"/memfd:optpoline (deleted)"
ANONYMOUS = b"//anon"
"""As perf calls it: is_anon_memory() in tools/perf/util/map.h."""


def rename_arenas(profile: bytes) -> bytes:
    """Return a profile in which arenas are anonymous memory.

    >>> rename_arenas(b"<" + ARENA_PATH + bytes(6) + b">").rstrip(b">").rstrip(bytes(1))
    b'<//anon'
    """
    return profile.replace(ARENA_PATH, ANONYMOUS.ljust(len(ARENA_PATH), b"\0"))


def main(args: list[str]) -> int:
    """Run it; return the exit status."""
    if len(args) > 1 or any(arg.startswith("-") for arg in args):
        sys.stderr.write("usage: optpoline-perf.py [PERF_DATA]\n")
        return 2
    path = Path(args[0]) if args else None
    before = sys.stdin.buffer.read() if path is None else path.read_bytes()
    after = rename_arenas(before)
    if path is None:
        sys.stdout.buffer.write(after)
    elif after != before:
        path.write_bytes(after)
    if after == before:
        sys.stderr.write("no block was mapped while this was recorded, or it is compressed\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
