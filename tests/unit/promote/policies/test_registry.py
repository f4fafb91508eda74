# SPDX-License-Identifier: Apache-2.0
"""Policies and thresholds by name."""

from __future__ import annotations

import pytest

from optpoline.errors import UsageError
from optpoline.promote.policies import DEFAULT_POLICY, POLICY_NAMES, policy_named, settings_of
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.schedule import WatchSchedule

each_policy = pytest.mark.parametrize("name", POLICY_NAMES)


@each_policy
def test_every_policy_goes_by_its_own_name(name: str) -> None:
    policy = policy_named(name)
    assert policy.name == name
    assert policy == policy_named(name, {})
    assert isinstance(policy.schedule, WatchSchedule)


@each_policy
def test_names_of_settings_are_not_ambiguous(name: str) -> None:
    names = [info.name for info in settings_of(name)]
    assert len(names) == len(set(names))
    assert {"overhead_ratio", "sample_every_s", "retpoline_cycles"} <= set(names)


@each_policy
def test_every_setting_can_be_set_to_what_it_is(name: str) -> None:
    settings = {info.name: str(info.value) for info in settings_of(name)}
    assert policy_named(name, settings) == policy_named(name)


@each_policy
def test_every_setting_can_be_changed(name: str) -> None:
    unchanged = policy_named(name)
    for info in settings_of(name):
        if info.value in (0.0, float("inf")):
            continue
        value = info.value + 1 if isinstance(info.value, int) else info.value * 0.75
        # An interval and its upper bound go together.
        settings = {info.name: value}
        if info.name == "sample_every_max_s":
            settings["sample_every_s"] = value
        if info.name == "sample_s":
            settings["min_part_s"] = value
        assert policy_named(name, settings) != unchanged, info.name


def test_settings_reach_policy_schedule_and_model() -> None:
    policy = policy_named("adaptive", {"min_count": "64", "n_parts": 2, "retpoline_cycles": 30.5})
    assert isinstance(policy, AdaptivePolicy)
    assert (policy.min_count, policy.schedule.n_parts) == (64, 2)
    assert isinstance(policy.min_count, int)
    assert policy.model.retpoline_cycles == 30.5


def test_default_is_a_policy() -> None:
    assert DEFAULT_POLICY in POLICY_NAMES
    assert list(POLICY_NAMES) == sorted(POLICY_NAMES)


@pytest.mark.parametrize(
    ("name", "settings", "words"),
    [
        ("none", {}, "no policy 'none'"),
        ("llvm", {"min_count": "3"}, "policy llvm has no setting 'min_count'"),
        ("llvm", {"max_guards": "many"}, "max_guards is a whole number"),
        ("llvm", {"max_guards": "1.5"}, "max_guards is a whole number"),
        ("llvm", {"total_ratio": "-1"}, "total_ratio is a number"),
        ("llvm", {"total_ratio": "nan"}, "total_ratio is a number"),
        ("llvm", {"max_guards": "inf"}, "max_guards is a whole number"),
        ("adaptive", {"sample_every_s": "100"}, "sample_every_s must be between"),
        ("adaptive", {"n_parts": "0"}, "at least one part"),
        ("adaptive", {"overhead_ratio": "0"}, "overhead_ratio must be above 0"),
    ],
)
def test_what_cannot_be_set_is_refused(name: str, settings: dict[str, str], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        policy_named(name, settings)
