# SPDX-License-Identifier: Apache-2.0
"""How many sites may be changed in one stop, learned from what earlier stops took."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Pace"]

FIRST_BATCH_SIZE = 128
"""Sites of the first stop: 0.4 ms of pokes where 2,000 took 5 ms."""

MIN_BATCH_SIZE = 16
MAX_BATCH_SIZE = 4096
"""A stop of a program with many threads is long however few sites it is for."""

STOP_SHARE = 0.6
"""Share of the greatest length that a batch is planned for; the rest is for surprises."""


@dataclass(slots=True)
class Pace:
    """How many sites fit a stop, learned from stop to stop.

    Attributes:
        max_ns: The greatest length of a stop.
        poke_ns: What one site takes, 0 before the first stop.
    """

    max_ns: int
    poke_ns: float = 0.0

    def batch_size(self) -> int:
        """Return how many sites the next stop may change."""
        if self.poke_ns == 0.0:
            return FIRST_BATCH_SIZE
        fitting = int(STOP_SHARE * self.max_ns / self.poke_ns)
        return max(MIN_BATCH_SIZE, min(MAX_BATCH_SIZE, fitting))

    def note(self, n_pokes: int, duration_ns: int) -> None:
        """Note how long a stop was; the fixed cost counts as the sites', to be on the safe side."""
        if n_pokes >= MIN_BATCH_SIZE and duration_ns:
            self.poke_ns = duration_ns / n_pokes
