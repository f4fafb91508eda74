# SPDX-License-Identifier: Apache-2.0
"""The cost model: cycles of the pieces a block is made of, and of what it replaces.

The numbers are named constants rather than measured at start-up: they steer
choices whose outcome is flat around the optimum (which of 80 targets comes
third), and a measurement on a shared machine would make plans irreproducible.
"""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["CPU_HZ", "CostModel"]

CPU_HZ = 3.0e9
"""Cycles a second of the cores that the numbers are for, to turn rates into shares of a CPU."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CostModel:
    """Cycles, on current x86-64 cores.

    Attributes:
        compare_cycles: One ``cmp`` and one branch that predicts right.
        branch_cycles: One more conditional branch on flags already computed.
        taken_cycles: What a taken branch inside a block costs more than one that
            falls through. 0 to 1 recovered the same (below).
        retpoline_cycles: A thunk from its call to its target. Feasibility
            study: 6.8 ns against 1.4 ns for a predicted call at ~3.5 GHz.
        plain_cycles: A plain indirect branch whose target changes. The same study: 4.4 to
            6.3 ns in a loop of calls, so 10 to 17 cycles more than a predicted one, which
            a guard costs as well. How often it does counts do not tell: one that never
            changes loses nothing by a guard, and is safe from injected targets by it.
        mispredict_cycles: A conditional branch that predicts wrong.
        mispredict_ratio: Share of the statically unavoidable mispredictions
            ``min(p, 1 - p)`` that history-based predictors still make. Measured by
            replaying 300,000 opcodes of each of Lua's eight scripts through a dispatch
            loop, on Golden Cove: of a retpoline's cost a tree recovered 96.1 % with
            0.05, 96.3 % with 0.125, 96.2 % with 0.15, 95.0 % with 1 (and the jump to
            the block alone, with a plain branch there, 97.5 %). It is the most for
            recursion: 95.1 and 96.8 %.
        min_gain_cycles: What a further target must save on average over all
            of the site's branches to be worth its bytes.
        cpu_hz: Cycles a second, to turn rates into shares of a CPU.
        min_cpu_ratio: Share of one CPU that promoting a site must save. A promoted
            block costs some 50 bytes and 0.5 ms of the controller once, so this only
            keeps out noise: 150 branches a second, which pay for that in ten minutes.
            With ten times as much, the cold sites of a program with 2,000 together
            lost it 10 % of what a branch costs.
        max_targets: Guards in one tree. 128 literals and their guards fill
            about 2.5 KiB, a twelfth of a first-level instruction cache.
    """

    compare_cycles: float = 1.0
    branch_cycles: float = 0.6
    taken_cycles: float = 0.3
    retpoline_cycles: float = 20.0
    plain_cycles: float = 10.0
    mispredict_cycles: float = 16.0
    mispredict_ratio: float = 0.125
    min_gain_cycles: float = 0.005
    cpu_hz: float = CPU_HZ
    min_cpu_ratio: float = 0.000001
    max_targets: int = 128

    def worthwhile(self, *, saved_cycles: float, rate_hz: float) -> bool:
        """Tell whether a site that saves so much per branch is worth a block."""
        return saved_cycles * rate_hz >= self.min_cpu_ratio * self.cpu_hz
