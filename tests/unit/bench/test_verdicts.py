# SPDX-License-Identifier: Apache-2.0
"""Each group is held against its own bar."""

from __future__ import annotations

import pytest

from bench.build import Variant
from bench.verdicts import group_mean, judge_group, judge_workload
from bench.workload import PROMOTED, Measured


def measured(group: str, plain: int, retpoline: int, promoted: int, name: str = "x") -> Measured:
    samples = {
        Variant.PLAIN.value: (plain,) * 5,
        Variant.RETPOLINE.value: (retpoline,) * 5,
        PROMOTED: (promoted,) * 5,
    }
    return Measured(group=group, name=name, samples=samples)


@pytest.mark.parametrize(
    ("group", "retpoline", "promoted", "name", "word"),
    [
        ("lua", 2000, 1060, "sort", "met"),
        ("lua", 2000, 1080, "sort", "MISSED"),
        ("sqlite", 1200, 1018, "x", "met"),
        ("sqlite", 1200, 1022, "x", "MISSED"),
        ("redis", 1050, 1055, "x", "met"),
        ("redis", 1050, 1070, "x", "MISSED"),
        ("cxx", 2000, 1040, "4 classes, sorted, 1 threads", "met"),
        ("cxx", 2000, 1060, "4 classes, sorted, 1 threads", "MISSED"),
        ("cxx", 2000, 1500, "8 classes, sorted, 1 threads", "reported"),
        ("other", 2000, 2500, "x", "reported"),
    ],
)
def test_bar_of_a_workload(group: str, retpoline: int, promoted: int, name: str, word: str) -> None:
    assert judge_workload(measured(group, 1000, retpoline, promoted, name)).word == word


def test_bar_of_the_group() -> None:
    good = [measured("lua", 1000, 2000, 1010), measured("lua", 1000, 2000, 1040)]
    bad = [measured("lua", 1000, 2000, 1010), measured("lua", 1000, 2000, 1060)]
    assert judge_group("lua", good).is_met is True
    assert judge_group("lua", bad).is_met is False
    assert judge_group("redis", bad).is_met is None


def test_nothing_promoted_is_only_reported() -> None:
    samples = {Variant.PLAIN.value: (1,) * 5, Variant.RETPOLINE.value: (2,) * 5}
    row = Measured(group="lua", name="x", samples=samples)
    assert judge_workload(row).is_met is None
    assert group_mean([row]) is None


def test_an_interval_too_wide_to_tell_is_neither_met_nor_missed() -> None:
    samples = {
        Variant.PLAIN.value: (1000,) * 5,
        Variant.RETPOLINE.value: (2000,) * 5,
        PROMOTED: (1010, 1700, 1005, 1800, 1000),
    }
    row = Measured(group="lua", name="x", samples=samples)
    assert judge_workload(row).word == "too noisy"
