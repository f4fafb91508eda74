# SPDX-License-Identifier: Apache-2.0
"""What policies are compared on, and how the bar is judged."""

from __future__ import annotations

import pytest

from bench.policies import Recorded, Recording, Replay, chosen_recordings


def make_replay(**cycles: float) -> Replay:
    """Return a replay with these cycles by policy."""
    return Replay(
        name="r",
        recorded=Recorded(n_branches=75, n_missing=25),
        seconds=1.0,
        n_changes=0,
        cycles=cycles,
        windows_hz=dict.fromkeys(cycles, 0.0),
        static_cycles=1.0,
    )


def test_ratio_is_of_the_best_whoever_that_is() -> None:
    assert make_replay(adaptive=3.0, cree=2.5, llvm=2.0).ratio == pytest.approx(1.5)
    assert make_replay(adaptive=2.0, cree=2.5, llvm=3.0).ratio == 1.0


def test_missing_ratio() -> None:
    assert Recorded(n_branches=75, n_missing=25).missing_ratio == pytest.approx(0.25)
    assert Recorded(n_branches=0, n_missing=0).missing_ratio == 0.0


def test_programs_of_many_kinds_are_recorded_each_under_a_name_of_its_own() -> None:
    chosen = chosen_recordings()
    names = [recording.name for recording in chosen]
    assert len(set(names)) == len(names)
    assert len({recording.build for recording in chosen}) >= 5


def test_learning_is_as_long_as_the_recorder_allows() -> None:
    recording: Recording
    for recording in chosen_recordings():
        assert recording.seconds >= 4 * recording.learn_s
