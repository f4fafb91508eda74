# SPDX-License-Identifier: Apache-2.0
"""Keep the names up by which profilers know a session's blocks (``controller/perf_map.py``)."""

from __future__ import annotations

import time

from optpoline.controller.perf_map import PerfMap
from optpoline.controller.standing import Standing
from optpoline.controller.target import Target

__all__ = ["BlockNames"]


class BlockNames:
    """The names of all blocks of a target.

    Args:
        target: The target.
        standing: Is told why blocks have no names, if they have none.
    """

    def __init__(self, target: Target, standing: Standing) -> None:
        """Name none yet."""
        self._target = target
        self._standing = standing
        self._perf_map = PerfMap(target.pid, target.symbol_at)
        self._n_changes_named = 0

    def update(self, *, at_once: bool = False) -> None:
        """Let profilers know the blocks by name; now and then, unless at once."""
        arenas, now_s = self._target.arenas, time.monotonic()
        n_changes = sum(arena.n_changes for arena in arenas)
        if n_changes == self._n_changes_named or not (at_once or self._perf_map.is_due(now_s)):
            return
        self._n_changes_named = n_changes
        blocks = [block for arena in arenas for block in arena.blocks]
        note = self._perf_map.update(blocks, now_s)
        if note is not None:
            self._standing.note(note)

    def remove(self) -> None:
        """Take the names away: no block is left."""
        self._perf_map.remove()

    def close(self) -> None:
        """Let go of what is open here; the names stay."""
        self._perf_map.close()
