# SPDX-License-Identifier: Apache-2.0
"""Variants take turns, and none is always first."""

from __future__ import annotations

from collections.abc import Callable

from bench.rounds import take_turns


def test_each_round_asks_every_variant_and_the_first_one_changes() -> None:
    asked: list[str] = []

    def work(name: str) -> Callable[[], int]:
        def iterate() -> int:
            asked.append(name)
            return len(asked)

        return iterate

    samples = take_turns({name: work(name) for name in "abc"}, rounds=3, warmup=0)
    assert {name: len(values) for name, values in samples.items()} == {"a": 3, "b": 3, "c": 3}
    turns = [asked[i] for i in range(0, len(asked), 3)]
    assert turns == ["a", "b", "c", "b", "c", "a", "c", "a", "b"]


def test_the_fastest_iteration_of_a_turn_counts() -> None:
    times = iter([9, 4, 7, 5, 6, 3])
    assert take_turns({"a": lambda: next(times)}, rounds=2, warmup=0) == {"a": (4, 3)}


def test_warm_up_rounds_do_not_count() -> None:
    times = iter(range(100))
    assert take_turns({"a": lambda: next(times)}, rounds=1, warmup=2) == {"a": (6,)}
