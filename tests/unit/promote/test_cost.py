# SPDX-License-Identifier: Apache-2.0
"""The threshold at which a site is worth a block."""

from __future__ import annotations

from optpoline.promote.cost import CostModel


def test_worthwhile_is_a_share_of_one_cpu() -> None:
    model = CostModel(cpu_hz=1e9, min_cpu_ratio=0.001)
    assert model.worthwhile(saved_cycles=10.0, rate_hz=100_000.0)
    assert not model.worthwhile(saved_cycles=10.0, rate_hz=99_999.0)
    assert not model.worthwhile(saved_cycles=-1.0, rate_hz=1e12)
    assert not model.worthwhile(saved_cycles=10.0, rate_hz=0.0)


def test_a_retpoline_costs_more_than_a_guard_that_mispredicts_as_often_as_not() -> None:
    model = CostModel()
    guard = model.compare_cycles + 0.5 * model.mispredict_ratio * model.mispredict_cycles
    assert guard < model.retpoline_cycles


def test_default_sizes_are_in_order() -> None:
    model = CostModel()
    assert 0.0 <= model.branch_cycles <= model.compare_cycles < model.mispredict_cycles
    assert 0.0 <= model.taken_cycles < model.mispredict_cycles < model.retpoline_cycles
    assert 0.0 < model.mispredict_ratio < 1.0
    assert 0.0 < model.min_gain_cycles < 0.1
    # Well below what anybody would notice, and above nothing at all.
    assert 0.0 < model.min_cpu_ratio < 0.001
