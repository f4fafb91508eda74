# SPDX-License-Identifier: Apache-2.0
"""Synthetic workloads: made from a few numbers and a seed, the same each time.

=============  ===============================================================
phases         every ``phase`` seconds other hot targets (``mode=targets``) or the same
               targets with other frequencies (``mode=weights``)
zipf           targets of a site, and sites among themselves, by Zipf's law
alternating    ``targets`` targets with equal shares, for ever
bursts         sites that are idle and then busy, each time with other targets
=============  ===============================================================

Counts have the noise that sampling has (Poisson), in a number of variants that
follow each other at random.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields

import numpy as np
from numpy.typing import NDArray

from optpoline.errors import UsageError
from optpoline.model import Table
from optpoline.simulate.workload import SLICE_S, Workload, WorkloadSite

__all__ = ["SYNTHETIC_NAMES", "Synthetic", "make_synthetic", "parse_synthetic"]

N_VARIANTS = 16
"""Noisy pictures of each distribution."""

TEXT_ADDR = 0x401000
TARGET_SPACING = 64
"""Bytes from one target to the next; what is compared with fits immediates."""

MAX_PAIRS = 1 << 17
MAX_SLICES = 1 << 22
MAX_RATE_HZ = 1e15
"""More than all CPUs of a large machine branch; counts of a slice are drawn as 64 bits."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Synthetic:
    """The numbers that make a synthetic workload; each may be set by its name.

    Attributes:
        sites: Number of sites.
        targets: Targets of each.
        rate: Branches a second of all sites together.
        seconds: Length.
        phase: Seconds of a phase, or of a burst and the pause before it.
        duty: Share of ``phase`` that a burst takes (``bursts``).
        hot: Targets that take nearly all branches in a phase (``phases``, ``bursts``).
        rest: Share of the branches that all targets take alike, hot or not (``phases``,
            ``bursts``): if it is 0 only hot ones are taken, and a change is one of targets.
        skew: Exponent of Zipf's law.
        mode: What changes with phases: "targets" or "weights".
        tables: Tables of dynamic calls that the sites share, in turn, with their targets; 0: each
            site has its own targets, and no table.
        branches: Guards that a site shall have at most, 0 for any number.
        seed: Of all chance.
    """

    sites: int = 4
    targets: int = 8
    rate: float = 40e6
    seconds: float = 30.0
    phase: float = 5.0
    duty: float = 0.2
    hot: int = 2
    rest: float = 0.0
    skew: float = 1.2
    mode: str = "targets"
    tables: int = 0
    branches: int = 0
    seed: int = 1

    def __post_init__(self) -> None:
        """Check what was set.

        Raises:
            UsageError: if a number makes no sense.
        """
        for name in ("sites", "targets", "rate", "seconds", "phase", "hot"):
            if not getattr(self, name) > 0:
                raise UsageError(f"{name} must be more than 0")
        if not 0 < self.duty <= 1:
            raise UsageError("duty must be more than 0, and 1 at most")
        if not 0 <= self.rest <= 1:
            raise UsageError("rest must be from 0 to 1")
        if not 0 <= self.skew <= 10:
            raise UsageError("skew must be from 0 to 10")
        for name in ("seed", "tables", "branches"):
            if getattr(self, name) < 0:
                raise UsageError(f"{name} must not be negative")
        if self.mode not in {"targets", "weights"}:
            raise UsageError(f"mode is {self.mode!r}; it can be targets or weights")
        if self.phase < SLICE_S:
            raise UsageError(f"phase must be {SLICE_S:g} at least, the length of a slice")
        if self.rate > MAX_RATE_HZ:
            raise UsageError(f"rate must be {MAX_RATE_HZ:.0f} at most")
        n_slices = max(self.seconds, self.phase) / SLICE_S
        if self.sites * self.targets > MAX_PAIRS or n_slices > MAX_SLICES:
            raise UsageError("so large a workload would not fit into memory")


SYNTHETIC_NAMES = ("phases", "zipf", "alternating", "bursts")

_DEFAULTS = {
    "phases": Synthetic(),
    "zipf": Synthetic(sites=50, targets=80),
    "alternating": Synthetic(targets=2),
    "bursts": Synthetic(sites=20),
}


def parse_synthetic(text: str) -> tuple[str, Synthetic]:
    """Return what ``name[:key=value,...]`` asks for.

    Raises:
        UsageError: if there is no such workload or number.

    >>> parse_synthetic("alternating:targets=3,seed=7")[1].targets
    3
    """
    name, _, rest = text.partition(":")
    if name not in _DEFAULTS:
        known = ", ".join(SYNTHETIC_NAMES)
        raise UsageError(f"there is no synthetic workload {name!r}", hint=f"there are {known}")
    values: dict[str, str] = {}
    for item in filter(None, rest.split(",")):
        key, equals, value = item.partition("=")
        if not equals:
            raise UsageError(f"{item!r} is not of the form key=value")
        values[key.strip()] = value.strip()
    keys = [field.name for field in fields(Synthetic)]
    for key in values:
        if key not in keys:
            names = ", ".join(keys)
            raise UsageError(f"a synthetic workload has no {key!r}", hint=f"it has {names}")
    return name, _with_values(_DEFAULTS[name], values)


def _with_values(spec: Synthetic, values: Mapping[str, str]) -> Synthetic:
    """Return a specification with some values set."""
    return Synthetic(
        sites=_whole(values, "sites", spec.sites),
        targets=_whole(values, "targets", spec.targets),
        rate=_number(values, "rate", spec.rate),
        seconds=_number(values, "seconds", spec.seconds),
        phase=_number(values, "phase", spec.phase),
        duty=_number(values, "duty", spec.duty),
        hot=_whole(values, "hot", spec.hot),
        rest=_number(values, "rest", spec.rest),
        skew=_number(values, "skew", spec.skew),
        mode=values.get("mode", spec.mode),
        tables=_whole(values, "tables", spec.tables),
        branches=_whole(values, "branches", spec.branches),
        seed=_whole(values, "seed", spec.seed),
    )


def _whole(values: Mapping[str, str], key: str, default: int) -> int:
    """Return a whole number that was set, or the default."""
    try:
        return int(values[key]) if key in values else default
    except ValueError as error:
        raise UsageError(f"{key}={values[key]} is not a whole number") from error


def _number(values: Mapping[str, str], key: str, default: float) -> float:
    """Return a number that was set, or the default."""
    try:
        number = float(values[key]) if key in values else default
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise UsageError(f"{key}={values[key]} is not a number")
    return number


def make_synthetic(name: str, spec: Synthetic, label: str | None = None) -> Workload:
    """Return a synthetic workload.

    Args:
        name: One of ``SYNTHETIC_NAMES``.
        spec: Its numbers.
        label: What people know it by, if not by its name.

    Raises:
        UsageError: if there is none of that name.
    """
    makers: dict[str, Callable[[Synthetic, np.random.Generator], _Phases]] = {
        "phases": _make_phases,
        "zipf": _make_zipf,
        "alternating": _make_alternating,
        "bursts": _make_bursts,
    }
    if name not in makers:
        raise UsageError(f"there is no synthetic workload {name!r}")
    rng = np.random.default_rng(spec.seed)
    return _build(label or name, spec, makers[name](spec, rng), rng)


_Phases = list[tuple[float, NDArray[np.float64]]]
"""(seconds, branches a second by pair) one after the other."""


def _even(spec: Synthetic) -> NDArray[np.float64]:
    """Return the rate of each site where all are equal."""
    return np.full(spec.sites, spec.rate / spec.sites)


def _zipf(n: int, skew: float) -> NDArray[np.float64]:
    """Return n shares by Zipf's law."""
    weights = np.arange(1.0, n + 1.0) ** -skew
    shares: NDArray[np.float64] = weights / weights.sum()
    return shares


def _join(rates: NDArray[np.float64], shares: Sequence[NDArray[np.float64]]) -> NDArray[np.float64]:
    """Return rates by pair from rates by site and shares by target."""
    return np.concatenate([rate * share for rate, share in zip(rates, shares, strict=True)])


def _hot_shares(spec: Synthetic, first: int) -> NDArray[np.float64]:
    """Return shares where ``hot`` targets from ``first`` on take all but ``rest``."""
    n_hot = min(spec.hot, spec.targets)
    shares = np.zeros(spec.targets)
    shares[(first + np.arange(n_hot)) % spec.targets] = (1.0 - spec.rest) * _zipf(n_hot, spec.skew)
    return shares + spec.rest / spec.targets


def _make_phases(spec: Synthetic, rng: np.random.Generator) -> _Phases:
    """Other targets, or other weights, every phase."""
    n_phases = max(1, round(spec.seconds / spec.phase))
    phases: _Phases = []
    for number in range(n_phases):
        if spec.mode == "targets":
            share = _hot_shares(spec, number * spec.hot)
        else:
            share = np.roll(_zipf(spec.targets, spec.skew), number)
        phases.append((spec.phase, _join(_even(spec), [share] * spec.sites)))
    return phases


def _make_zipf(spec: Synthetic, rng: np.random.Generator) -> _Phases:
    """Zipf's law among sites and among the targets of each, for ever."""
    shares = [rng.permutation(_zipf(spec.targets, spec.skew)) for _ in range(spec.sites)]
    return [(spec.seconds, _join(spec.rate * _zipf(spec.sites, spec.skew), shares))]


def _make_alternating(spec: Synthetic, rng: np.random.Generator) -> _Phases:
    """Equal shares, for ever."""
    share = np.full(spec.targets, 1.0 / spec.targets)
    return [(spec.seconds, _join(_even(spec), [share] * spec.sites))]


def _make_bursts(spec: Synthetic, rng: np.random.Generator) -> _Phases:
    """Idle, then a quarter of the sites busy, with other targets each time."""
    n_bursts = max(1, round(spec.seconds / spec.phase))
    phases: _Phases = []
    for _ in range(n_bursts):
        busy = rng.permutation(spec.sites)[: max(1, spec.sites // 4)]
        rates = np.zeros(spec.sites)
        rates[busy] = spec.rate / len(busy)
        shares = [_hot_shares(spec, int(rng.integers(spec.targets))) for _ in range(spec.sites)]
        burst_s = spec.phase * spec.duty
        phases.append((spec.phase - burst_s, np.zeros(spec.sites * spec.targets)))
        phases.append((burst_s, _join(rates, shares)))
    return phases


def _build(name: str, spec: Synthetic, phases: _Phases, rng: np.random.Generator) -> Workload:
    """Return a workload of phases, with noise."""
    contents: list[NDArray[np.float64]] = []
    slices: list[NDArray[np.int64]] = []
    known: dict[bytes, int] = {}
    n_rows = 0
    for seconds, rates in phases:
        key = rates.tobytes()
        if key not in known:
            known[key] = n_rows
            n_variants = N_VARIANTS if rates.any() else 1
            contents.append(rng.poisson(rates * SLICE_S, (n_variants, len(rates))).astype(float))
            n_rows += n_variants
        n_variants = N_VARIANTS if rates.any() else 1
        n_slices = round(seconds / SLICE_S)
        slices.append(known[key] + rng.integers(n_variants, size=n_slices))
    numbers = np.concatenate(slices)
    # Sites of one table have the same targets.
    owners = np.arange(spec.sites) % spec.tables if spec.tables else np.arange(spec.sites)
    target_numbers = spec.targets * owners[:, None] + np.arange(spec.targets)
    return Workload(
        name=name,
        sites=tuple(
            WorkloadSite(
                name=f"site {i}",
                table=Table(name=f"table {owners[i]}", type=None) if spec.tables else None,
                max_guards=spec.branches,
            )
            for i in range(spec.sites)
        ),
        pair_sites=np.repeat(np.arange(spec.sites), spec.targets),
        pair_targets=TEXT_ADDR + TARGET_SPACING * target_numbers.ravel(),
        contents=np.concatenate(contents),
        slices=numbers,
        factors=np.ones(len(numbers)),
    )
