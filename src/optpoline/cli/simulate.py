# SPDX-License-Identifier: Apache-2.0
"""``optpoline simulate TRACE``: what policies make of a recorded program."""

from __future__ import annotations

import os

import click
from click.core import ParameterSource

from optpoline.cli.artifact import Artifact
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import pass_invocation, shared_options
from optpoline.errors import UsageError

__all__ = ["simulate_command"]


@click.command("simulate")
@click.argument("trace", required=False)
@click.option(
    "--policy",
    "policies",
    multiple=True,
    metavar="NAME",
    help="Policy to replay: adaptive, bolt, cree, jumpswitch or llvm; may be given several "
    "times. Without it: all.",
)
@click.option(
    "--policy-set",
    "settings",
    multiple=True,
    metavar="[POLICY.]NAME=VALUE",
    help="Set a threshold, of one policy or of all that have it.",
)
@click.option(
    "--synthetic",
    metavar="NAME[:KEY=VALUE,...]",
    help="Make a workload instead of reading a trace: phases, zipf, alternating, bursts.",
)
@click.option(
    "--repeat",
    type=click.IntRange(1, 1000),
    default=1,
    show_default=True,
    help="Replay the workload so many times, one after the other.",
)
@click.option("--plot", metavar="FILE.svg", help="Plot hits and cycles over time.")
@click.option(
    "--project", is_flag=True, help="Project memory and time for up to a million sites instead."
)
@click.option(
    "--cpus",
    type=click.IntRange(1, 8192),
    default=os.cpu_count() or 1,
    show_default="of this machine",
    help="CPUs that counter tables are for.",
)
@click.option(
    "--seed",
    type=click.IntRange(0),
    default=1,
    show_default=True,
    help="Of what is left to chance in a replay.",
)
@shared_options
@click.pass_context
@pass_invocation
def simulate_command(
    invocation: Invocation,
    ctx: click.Context,
    trace: str | None,
    policies: tuple[str, ...],
    settings: tuple[str, ...],
    synthetic: str | None,
    repeat: int,
    plot: str | None,
    project: bool,
    cpus: int,
    seed: int,
) -> None:
    """Replay a trace through promotion policies.

    The trace is recorded or synthetic. Says how many branches each policy would
    have led directly to their targets, what that takes in cycles, how soon
    changes were followed, and in how much memory. Nothing is attached to.
    """
    # Not at the top: --help must not wait for numpy.
    from optpoline.cli.simulation import project_all, simulate_all

    invocation.sink.validate_writable()
    if (trace is not None) + (synthetic is not None) + project != 1:
        raise UsageError("name one of: a trace, --synthetic, --project")
    if project and plot is not None:
        raise UsageError("there is nothing to plot of a projection", hint="leave out --plot")
    if project:
        _validate_projection(ctx)
        project_all(invocation, policies, settings)
        return
    artifact = None
    if plot is not None:
        artifact = Artifact(option="--plot", path=plot, force=invocation.sink.force)
        artifact.validate_writable()
    simulate_all(
        invocation,
        trace=trace,
        synthetic=synthetic,
        repeat=repeat,
        policies=policies,
        settings=settings,
        plot=artifact,
        n_cpus=cpus,
        seed=seed,
    )


def _validate_projection(ctx: click.Context) -> None:
    """Refuse what only a replay obeys, though it has a default.

    Raises:
        UsageError: if such an option was given.
    """
    for name in ("repeat", "cpus", "seed"):
        if ctx.get_parameter_source(name) is not ParameterSource.DEFAULT:
            raise UsageError(
                f"--project takes no --{name}",
                hint="leave it out: a projection replays nothing, and is for 1 to 256 CPUs",
            )
