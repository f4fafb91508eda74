# SPDX-License-Identifier: Apache-2.0
"""Policies by name, with their thresholds by name.

A setting is a number among the fields of a policy, its schedule or its cost model;
no name is in two of these, so that one flat list of ``NAME=VALUE`` is enough.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, TypeVar

from optpoline.errors import UsageError
from optpoline.promote.policies.adaptive import AdaptivePolicy
from optpoline.promote.policies.bolt import BoltPolicy
from optpoline.promote.policies.cree import CreePolicy
from optpoline.promote.policies.jumpswitch import JumpSwitchPolicy
from optpoline.promote.policies.llvm import LlvmPolicy
from optpoline.promote.policy import Policy

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

__all__ = ["DEFAULT_POLICY", "POLICY_NAMES", "SettingInfo", "policy_named", "settings_of"]

R = TypeVar("R", bound="DataclassInstance")

_AnyPolicy = AdaptivePolicy | BoltPolicy | CreePolicy | JumpSwitchPolicy | LlvmPolicy

_MAKERS: Mapping[str, Callable[[], _AnyPolicy]] = {
    "adaptive": AdaptivePolicy,
    "bolt": BoltPolicy,
    "cree": CreePolicy,
    "jumpswitch": JumpSwitchPolicy,
    "llvm": LlvmPolicy,
}

POLICY_NAMES = tuple(_MAKERS)
"""All policies, in alphabetical order."""

DEFAULT_POLICY = "adaptive"


@dataclass(frozen=True, slots=True, kw_only=True)
class SettingInfo:
    """One number that can be set.

    Attributes:
        name: As in ``NAME=VALUE``.
        owner: What it is a field of: the policy's name, ``schedule`` or ``model``.
        value: What it is unless set.
    """

    name: str
    owner: str
    value: float


def settings_of(name: str) -> tuple[SettingInfo, ...]:
    """Return all that can be set of a policy, its own thresholds first.

    Raises:
        UsageError: if there is no such policy.
    """
    policy = _make(name)
    return (
        *_numbers(policy, name),
        *_numbers(policy.schedule, "schedule"),
        *_numbers(policy.model, "model"),
    )


def policy_named(name: str, settings: Mapping[str, str | float] | None = None) -> Policy:
    """Return a policy with some of its thresholds set.

    Args:
        name: One of ``POLICY_NAMES``.
        settings: Values by name (``settings_of``), as numbers or as text.

    Raises:
        UsageError: if there is no such policy or setting, or no such value of it.

    >>> policy_named("llvm", {"max_guards": "2"}).name
    'llvm'
    """
    policy = _make(name)
    known = {info.name: info for info in settings_of(name)}
    chosen: dict[str, dict[str, float]] = {name: {}, "schedule": {}, "model": {}}
    for key, given in (settings or {}).items():
        info = known.get(key)
        if info is None:
            raise UsageError(
                f"policy {name} has no setting {key!r}",
                hint=f"it has {', '.join(sorted(known))}",
            )
        chosen[info.owner][key] = _parse(info, given)
    try:
        schedule = _with(policy.schedule, chosen["schedule"])
        model = _with(policy.model, chosen["model"])
        return replace(_with(policy, chosen[name]), schedule=schedule, model=model)
    except ValueError as error:
        raise UsageError(f"policy {name}: {error}") from error


def _make(name: str) -> _AnyPolicy:
    """Return a policy with its defaults."""
    maker = _MAKERS.get(name)
    if maker is None:
        raise UsageError(f"there is no policy {name!r}", hint=f"there are {', '.join(_MAKERS)}")
    return maker()


def _numbers(record: DataclassInstance, owner: str) -> tuple[SettingInfo, ...]:
    """Return the fields of a record that are numbers."""
    named = ((field.name, getattr(record, field.name)) for field in fields(record))
    return tuple(
        SettingInfo(name=name, owner=owner, value=value)
        for name, value in named
        if isinstance(value, int | float)
    )


def _parse(info: SettingInfo, given: str | float) -> float:
    """Return a value as a number of the kind that the setting has."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    is_whole = isinstance(info.value, int)
    if math.isnan(value) or value < 0 or (is_whole and not value.is_integer()):
        kind = "whole number" if is_whole else "number"
        raise UsageError(f"{info.name} is a {kind} from 0 up, not {given!r}")
    return int(value) if is_whole else value


def _with(record: R, values: Mapping[str, float]) -> R:
    """Return a record with some of its numbers replaced."""
    return replace(record, **values)
