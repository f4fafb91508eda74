# SPDX-License-Identifier: Apache-2.0
"""``optpoline record PID`` or ``-- CMD``: keep a trace of what a program's sites do."""

from __future__ import annotations

import shlex

import click

from optpoline.cli.artifact import Artifact
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import (
    MILLISECONDS,
    MILLISECONDS_OR_NONE,
    PID_MAX,
    SECONDS,
    parse_pid,
    pass_invocation,
    shared_options,
)
from optpoline.errors import UsageError

__all__ = ["record_command"]

_IS_COMMAND = "optpoline.record.is_command"


class _RecordCommand(click.Command):
    """Notes whether what follows is behind ``--``: then it is a command, else a process id."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Look for the dashes, which click takes away."""
        ctx.meta[_IS_COMMAND] = "--" in args
        return super().parse_args(ctx, args)


@click.command("record", cls=_RecordCommand)
@click.argument(
    "target", nargs=-1, required=True, type=click.UNPROCESSED, metavar="PID | -- CMD [ARGS]..."
)
@click.option("--trace", required=True, metavar="FILE", help="Where the trace goes.")
@click.option(
    "--duration",
    type=SECONDS,
    metavar="S",
    default=10.0,
    show_default=True,
    help="Let go S seconds after the attach was complete.",
)
@click.option(
    "--learn-seconds",
    type=SECONDS,
    metavar="S",
    default=1.0,
    show_default=True,
    help="Length of the learning window before, a quarter of the duration at most.",
)
@click.option(
    "--burst-ms",
    type=MILLISECONDS,
    metavar="MS",
    default=20.0,
    show_default=True,
    help="Length of a burst.",
)
@click.option(
    "--every-ms",
    type=MILLISECONDS_OR_NONE,
    metavar="MS",
    default=200.0,
    show_default=True,
    help="From one burst to the next; 0: record all the time.",
)
@shared_options
@click.pass_context
@pass_invocation
def record_command(
    invocation: Invocation,
    ctx: click.Context,
    target: tuple[str, ...],
    trace: str,
    duration: float,
    learn_seconds: float,
    burst_ms: float,
    every_ms: float,
) -> None:
    """Keep a trace of what a program does at its sites.

    Their targets are learned first. Then each branch is written down, in bursts,
    for `optpoline simulate`. In the end every byte is put back.
    """
    # Not at the top: --help must not wait for numpy.
    from optpoline.cli.recording import make_order, record_process, record_program

    invocation.sink.validate_writable()
    artifact = Artifact(option="--trace", path=trace, force=invocation.sink.force)
    artifact.validate_writable()
    order = make_order(
        artifact,
        duration_s=duration,
        learn_s=learn_seconds,
        burst_s=burst_ms / 1e3,
        every_s=every_ms / 1e3,
    )
    if ctx.meta[_IS_COMMAND]:
        record_program(invocation, target, order)
    else:
        record_process(invocation, _pid_of(target), order)


def _pid_of(target: tuple[str, ...]) -> int:
    """Return the process id that was given.

    Raises:
        UsageError: if it is none.
    """
    pid = parse_pid(target[0]) if len(target) == 1 else None
    if pid is None or not 0 < pid <= PID_MAX:
        raise UsageError(
            f"{shlex.join(target)!r} is not a process id", hint="write -- before a command"
        )
    return pid
