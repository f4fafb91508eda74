# SPDX-License-Identifier: Apache-2.0
"""Variants measured in turn, in an order that rotates from round to round."""

from __future__ import annotations

from collections.abc import Callable, Mapping

__all__ = ["take_turns"]

_TRIES = 3
"""Iterations per turn, of which the fastest counts: interference only ever adds time."""


def take_turns(
    variants: Mapping[str, Callable[[], int]], *, rounds: int, warmup: int = 2
) -> dict[str, tuple[int, ...]]:
    """Give each variant one turn per round: a few iterations, of which the fastest counts.

    Args:
        variants: Name to a function that does the work once and returns nanoseconds.
        rounds: Rounds that count.
        warmup: Rounds before them that do not.

    Returns:
        Samples of each variant in order of rounds.

    >>> take_turns({"a": lambda: 1, "b": lambda: 2}, rounds=2)
    {'a': (1, 1), 'b': (2, 2)}
    """
    names = list(variants)
    samples: dict[str, list[int]] = {name: [] for name in names}
    for turn in range(warmup + rounds):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            elapsed = min(variants[name]() for _ in range(_TRIES))
            if turn >= warmup:
                samples[name].append(elapsed)
    return {name: tuple(values) for name, values in samples.items()}
