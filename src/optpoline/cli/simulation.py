# SPDX-License-Identifier: Apache-2.0
"""The work of ``optpoline simulate``; apart from its options, which need no numpy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from optpoline.cli.artifact import Artifact
from optpoline.cli.invocation import Invocation
from optpoline.errors import UsageError
from optpoline.promote.policies import (
    DEFAULT_POLICY,
    POLICY_NAMES,
    policy_named,
    settings_of,
)
from optpoline.promote.policy import Policy
from optpoline.report.simulate_document import projection_document, simulation_document
from optpoline.report.simulate_plot import format_plot
from optpoline.report.simulate_text import format_comparison, format_projection
from optpoline.simulate.compare import compare
from optpoline.simulate.from_trace import workload_of_trace
from optpoline.simulate.projection import measure, project
from optpoline.simulate.state import EngineModel
from optpoline.simulate.synthetic import make_synthetic, parse_synthetic
from optpoline.simulate.trace_file import read_trace
from optpoline.simulate.workload import Workload

__all__ = ["project_all", "simulate_all"]

ALL = "all"


def simulate_all(
    invocation: Invocation,
    *,
    trace: str | None,
    synthetic: str | None,
    repeat: int,
    policies: Sequence[str],
    settings: Sequence[str],
    plot: Artifact | None,
    n_cpus: int,
    seed: int,
) -> None:
    """Replay, plot and tell.

    Args:
        invocation: The call.
        trace: A trace file, or None for ``synthetic``.
        synthetic: What to make instead.
        repeat: How many times over.
        policies: Their names; none for all.
        settings: ``[POLICY.]NAME=VALUE`` each.
        plot: Where the plot goes, if one is wanted.
        n_cpus: CPUs that counter tables are for.
        seed: Of all chance.
    """
    chosen = _choose(policies or (ALL,), settings)
    workload = _synthetic(synthetic) if trace is None else _recorded(trace)
    comparison = compare(
        workload.repeated(repeat), chosen, engine=EngineModel(n_cpus=n_cpus, seed=seed)
    )
    if plot is not None:
        with plot.open() as stream:
            stream.write(format_plot(comparison).encode())
    invocation.sink.write(simulation_document(comparison))
    if not invocation.sink.takes_stdout:
        invocation.print_data(format_comparison(comparison, invocation.stdout_style()))
    invocation.console().say_all(f"note: {note}" for note in workload.notes)


def project_all(invocation: Invocation, policies: Sequence[str], settings: Sequence[str]) -> None:
    """Measure, project and tell, for one policy."""
    chosen = _choose(policies or (DEFAULT_POLICY,), settings)
    if len(chosen) != 1:
        raise UsageError("a projection is for one policy")
    (policy,) = chosen
    measured = measure(policy)
    projections = project(policy, measured)
    invocation.sink.write(projection_document(policy.name, measured, projections))
    if not invocation.sink.takes_stdout:
        style = invocation.stdout_style()
        invocation.print_data(format_projection(policy.name, measured, projections, style))


def _recorded(path: str) -> Workload:
    """Return a trace file as a workload."""
    return workload_of_trace(read_trace(Path(path)), path)


def _synthetic(text: str | None) -> Workload:
    """Return a synthetic workload."""
    name, spec = parse_synthetic(text or "")
    return make_synthetic(name, spec, text)


def _choose(names: Sequence[str], settings: Sequence[str]) -> list[Policy]:
    """Return the policies asked for, each once, with what was set."""
    chosen = list(POLICY_NAMES) if ALL in names else list(dict.fromkeys(names))
    known = {name: {info.name for info in settings_of(name)} for name in chosen}
    values: dict[str, dict[str, str]] = {name: {} for name in chosen}
    for setting in settings:
        key, equals, value = setting.partition("=")
        if not equals:
            raise UsageError(f"{setting!r} is not of the form NAME=VALUE")
        for name, own_key in _owners(key, known):
            values[name][own_key] = value
    return [policy_named(name, values[name]) for name in chosen]


def _owners(key: str, known: Mapping[str, set[str]]) -> list[tuple[str, str]]:
    """Return (policy, name of its setting) of all that a setting is for.

    Raises:
        UsageError: if there is none.
    """
    owner, dot, own_key = key.rpartition(".")
    if dot:
        if owner not in known:
            raise UsageError(f"policy {owner!r} is not among those replayed")
        return [(owner, own_key)]
    owners = [(name, key) for name, names in known.items() if key in names]
    if not owners:
        everything = sorted(set().union(*known.values()))
        raise UsageError(
            f"none of these policies has a setting {key!r}",
            hint=f"there are {', '.join(everything)}",
        )
    return owners
