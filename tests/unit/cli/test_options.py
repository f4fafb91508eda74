# SPDX-License-Identifier: Apache-2.0
"""Options that several verbs share, and the settings made of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import pytest

from optpoline.cli.api import OnEvent, SessionSettings
from optpoline.cli.main import main
from optpoline.cli.options import make_settings
from optpoline.controller.config import Config
from optpoline.errors import UsageError
from optpoline.promote.policies import DEFAULT_POLICY, POLICY_NAMES, policy_named
from optpoline.promote.policies.adaptive import AdaptivePolicy
from tests.unit.cli.fakes import FakeApi, FakeSession


@dataclass
class RecordingApi(FakeApi):
    """Notes the settings it was given."""

    settings: SessionSettings | None = None

    def attach(self, pid: int, *, settings: SessionSettings, on_event: OnEvent) -> FakeSession:
        """Attach to nothing."""
        self.settings = settings
        return super().attach(pid, settings=settings, on_event=on_event)


def make(*policy_set: str, policy: str = "adaptive") -> SessionSettings:
    """Return the settings of a command line."""
    return make_settings(
        learn_seconds=2.0, max_stop_ms=5.0, policy=policy, policy_set=policy_set, follow_fork=True
    )


def test_settings_are_what_was_asked_for() -> None:
    settings = make("min_count=64", "overhead_ratio=0.5")
    assert settings == SessionSettings(
        learn_s=2.0,
        max_stop_s=0.005,
        follow_fork=True,
        policy="adaptive",
        policy_settings=(("min_count", "64"), ("overhead_ratio", "0.5")),
    )


def test_last_value_of_a_name_holds() -> None:
    assert make("min_count=1", "min_count=2").policy_settings == (("min_count", "2"),)


@pytest.mark.parametrize("text", ["min_count", "=3", "min_count=", ""])
def test_setting_without_name_or_value_is_refused(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=VALUE"):
        make(text)


def test_length_of_the_first_window_is_no_setting_of_a_session() -> None:
    with pytest.raises(UsageError, match="--learn-seconds"):
        make("learn_s=3")


def test_defaults_are_the_same_everywhere() -> None:
    assert SessionSettings().policy == DEFAULT_POLICY
    assert Config().policy == policy_named(DEFAULT_POLICY)
    api = RecordingApi()
    assert main(["attach", "1", "--duration", "0"], api=api) == 0
    assert api.settings == SessionSettings()


@pytest.mark.parametrize("verb", ["attach", "run"])
def test_help_names_every_policy(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"], api=FakeApi()) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in POLICY_NAMES)
    assert "--policy-set NAME=VALUE" in text


def test_attach_passes_the_policy_on() -> None:
    api = RecordingApi()
    argv = ["attach", "1", "--duration", "0", "--policy", "llvm", "--policy-set", "max_guards=2"]
    assert main(argv, api=api) == 0
    assert api.settings is not None
    assert api.settings.policy == "llvm"
    assert api.settings.policy_settings == (("max_guards", "2"),)


def test_attach_passes_the_way_to_change_sites_on() -> None:
    api = RecordingApi()
    assert main(["attach", "1", "--duration", "0", "--change", "switch-off"], api=api) == 0
    assert api.settings == SessionSettings(change="switch-off")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--policy", "best"], "there is no policy 'best'"),
        (["--policy-set", "speed=9"], "has no setting 'speed'"),
        (["--policy-set", "min_count=few"], "min_count is a whole number"),
        (["--policy-set", "min_count"], "NAME=VALUE"),
        (["--change", "both"], "'swap', 'switch-off'"),
        (["--max-stop-ms", "1e308"], "more than 1000000000 milliseconds"),
        (["--duration", "1e18"], "more than 1000000000 seconds"),
    ],
)
def test_what_cannot_be_set_is_told_before_anything_is_touched(
    options: list[str], words: str, capsys: pytest.CaptureFixture[str]
) -> None:
    api = RecordingApi()
    assert main(["attach", "1", *options], api=api) == 2
    assert words in capsys.readouterr().err
    assert api.settings is None
    # Nor is a program started: 125 is what run exits with for a failure of its own.
    assert main(["run", *options, "--", "/bin/true"], api=api) == 125
    assert words in capsys.readouterr().err


# --- what a session makes of it


def test_config_overrides_the_policys_schedule() -> None:
    policy = AdaptivePolicy()
    assert Config(policy=policy).schedule == policy.schedule
    schedule = Config(
        policy=policy,
        learn_s=0.5,
        sample_s=0.008,
        sample_every_s=0.1,
        sample_every_max_s=0.2,
        overhead_ratio=0.5,
    ).schedule
    assert (schedule.learn_s, schedule.sample_s, schedule.overhead_ratio) == (0.5, 0.008, 0.5)
    assert (schedule.sample_every_s, schedule.sample_every_max_s) == (0.1, 0.2)
    assert schedule.n_parts == policy.schedule.n_parts


@pytest.mark.parametrize("value", [-1, float("nan"), float("inf"), 1e308, "1", True], ids=repr)
@pytest.mark.parametrize("name", ["learn_s", "max_stop_s", "stop_timeout_s", "overhead_ratio"])
def test_config_refuses_what_is_no_number(name: str, value: object) -> None:
    make_config = cast(Callable[..., Config], Config)
    with pytest.raises(UsageError, match=name):
        make_config(**{name: value})


@pytest.mark.parametrize(
    ("learn_s", "all_s", "hot_s"), [(None, 1.0, 0.5), (1.0, 1.0, 1.0), (0.0, 0.0, 0.0)]
)
def test_first_window_is_shorter_of_many_sites_unless_set(
    learn_s: float | None, all_s: float, hot_s: float
) -> None:
    config = Config(learn_s=learn_s)
    assert config.first_window_s(is_hot_only=False) == all_s
    assert config.first_window_s(is_hot_only=True) == hot_s


@pytest.mark.parametrize(("options", "learn_s"), [((), None), (("--learn-seconds", "1"), 1.0)])
def test_first_window_is_set_on_the_command_line(
    options: tuple[str, ...], learn_s: float | None
) -> None:
    api = RecordingApi()
    assert main(["attach", "1", "-q", *options], api=api) == 0
    assert api.settings is not None
    assert api.settings.learn_s == learn_s
    assert api.session.calls[0] == ("learn" if learn_s is None else "learn 1")


def test_config_stays_consistent_whatever_is_set() -> None:
    # An interval above the policy's longest one, and a window below its shortest part.
    schedule = Config(sample_every_s=3600.0, sample_s=0.0001).schedule
    assert schedule.sample_every_max_s == 3600.0
    assert schedule.min_part_s == 0.0001
