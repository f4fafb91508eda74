# SPDX-License-Identifier: Apache-2.0
"""Options and argument types that several verbs share."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import click

from optpoline.cli.api import SessionSettings
from optpoline.cli.invocation import Invocation
from optpoline.cli.output import JsonSink
from optpoline.controller.arguments import CHANGES, Change
from optpoline.errors import UsageError
from optpoline.toolchain.compiler import DEFAULT_COMMAND

__all__ = [
    "MILLISECONDS",
    "MILLISECONDS_OR_NONE",
    "PID",
    "SECONDS",
    "SECONDS_OR_NONE",
    "compiler_option",
    "make_settings",
    "parse_pid",
    "pass_invocation",
    "session_options",
    "shared_options",
]

PID_MAX = 1 << 22
"""No process id is larger (PID_MAX_LIMIT, include/linux/threads.h)."""

MAX_LENGTH = 1e9
"""Of seconds, 31 years; of milliseconds, 11 days. What is longer is a mistake."""

P = ParamSpec("P")
R = TypeVar("R")

pass_invocation = click.make_pass_decorator(Invocation)


def parse_pid(text: str) -> int | None:
    """Return a process id written in decimal or hex, None if it is not a number.

    >>> parse_pid("4711"), parse_pid("0x1267"), parse_pid("./4711"), parse_pid("4_711")
    (4711, 4711, None, None)
    """
    digits = text.strip()
    is_hex = digits[:2].lower() == "0x"
    try:
        # Python's own spellings of numbers, such as 4_711, are file names to a shell.
        is_plain = digits.isascii() and "_" not in digits
        return int(digits, 16 if is_hex else 10) if is_plain else None
    except ValueError:
        return None


class _PidType(click.ParamType[int]):
    """A process id."""

    name = "pid"

    def convert(
        self, value: str | int, param: click.Parameter | None, ctx: click.Context | None
    ) -> int:
        """Accept decimal and hex, refuse what no process can have."""
        pid = value if isinstance(value, int) else parse_pid(value)
        if pid is None or pid <= 0:
            self.fail(f"{value!r} is not a process id (decimal, or hex after 0x)", param, ctx)
        if pid > PID_MAX:
            self.fail(f"{value!r} is above the largest process id, {PID_MAX}", param, ctx)
        return pid


class _TimeType(click.ParamType[float]):
    """A length of time.

    Args:
        unit: What it is counted in, plural.
        may_be_zero: Whether none at all makes sense.
    """

    def __init__(self, unit: str, *, may_be_zero: bool = False) -> None:
        """Keep what is allowed."""
        self.name = unit
        self._may_be_zero = may_be_zero

    def convert(
        self, value: str | float, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        """Accept finite numbers above 0, or from 0 up."""
        try:
            length = float(value)
        except ValueError:
            length = math.nan
        if not math.isfinite(length) or length < 0:
            self.fail(f"{value!r} is not a number of {self.name}", param, ctx)
        if length == 0 and not self._may_be_zero:
            self.fail(f"{value!r} is not a number of {self.name} above 0", param, ctx)
        if length > MAX_LENGTH:
            self.fail(f"{value!r} is more than {MAX_LENGTH:.0f} {self.name}", param, ctx)
        return length


PID = _PidType()
SECONDS = _TimeType("seconds")
SECONDS_OR_NONE = _TimeType("seconds", may_be_zero=True)
MILLISECONDS = _TimeType("milliseconds")
MILLISECONDS_OR_NONE = _TimeType("milliseconds", may_be_zero=True)


def _set_json(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    """Note where JSON goes."""
    invocation = ctx.find_object(Invocation)
    if invocation is not None:
        invocation.sink = JsonSink(path=value, force=invocation.sink.force)


def _set_force(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Note that a file may be overwritten."""
    invocation = ctx.find_object(Invocation)
    if invocation is not None:
        invocation.sink = JsonSink(path=invocation.sink.path, force=value)


def _set_colour(ctx: click.Context, _param: click.Parameter, value: str) -> None:
    """Note whether colours are wanted."""
    invocation = ctx.find_object(Invocation)
    if invocation is not None:
        invocation.colour = value


def _set_quiet(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Note that only errors are wanted."""
    invocation = ctx.find_object(Invocation)
    if invocation is not None:
        invocation.quiet = value


def _set_verbose(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    """Note that more is wanted."""
    invocation = ctx.find_object(Invocation)
    if invocation is not None:
        invocation.verbose = value


def compiler_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add the option of the verbs that are about a compiler."""
    decorate = click.option(
        "--cc",
        metavar="COMMAND",
        envvar="CC",
        default=DEFAULT_COMMAND,
        show_default=True,
        help="The C compiler, as in $CC.",
    )
    return decorate(function)


def shared_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add the options every verb has.

    They are eager: should another one turn out wrong, the error already goes
    where and how the user asked for.
    """
    decorators = [
        click.option(
            "--json",
            metavar="FILE",
            is_eager=True,
            expose_value=False,
            callback=_set_json,
            help="Write the result, or the error, as JSON to FILE ('-': stdout).",
        ),
        click.option(
            "-f",
            "--force",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_set_force,
            help="Replace the files to be written if they exist.",
        ),
        click.option(
            "-q",
            "--quiet",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_set_quiet,
            help="Say nothing but errors.",
        ),
        click.option(
            "-v",
            "--verbose",
            is_flag=True,
            is_eager=True,
            expose_value=False,
            callback=_set_verbose,
            help="Say more.",
        ),
        click.option(
            "--color",
            type=click.Choice(["auto", "always", "never"]),
            default="auto",
            is_eager=True,
            expose_value=False,
            callback=_set_colour,
            help="When to use colours.",
        ),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def session_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add the options of the verbs that hold a session (``run``, ``attach``)."""
    decorators = [
        click.option(
            "--duration",
            type=SECONDS_OR_NONE,
            metavar="S",
            help="Let go S seconds after the attach was complete.",
        ),
        click.option(
            "--learn-seconds",
            type=SECONDS,
            metavar="S",
            show_default="1; 0.5 if of many sites only those that run are learned",
            help="Length of the first learning window.",
        ),
        click.option(
            "--max-stop-ms",
            type=MILLISECONDS,
            metavar="MS",
            default=5.0,
            show_default=True,
            help="Longest stop while the text is changed; more sites take more stops.",
        ),
        click.option(
            "--policy",
            metavar="NAME",
            default="adaptive",
            show_default=True,
            help="Rule that decides what is promoted: adaptive, bolt, cree, jumpswitch or llvm.",
        ),
        click.option(
            "--policy-set",
            metavar="NAME=VALUE",
            multiple=True,
            help="Set one of the policy's thresholds; may be given several times.",
        ),
        click.option(
            "--follow-fork", is_flag=True, help="Restore forked children at the end as well."
        ),
        click.option(
            "--shared-counters",
            is_flag=True,
            help="Count in one row for all CPUs, to see what a row for each is worth.",
        ),
        click.option(
            "--promote-plain",
            is_flag=True,
            help="Promote plain indirect branches that a compiler plugin marked, too.",
        ),
        click.option(
            "--change",
            type=click.Choice(CHANGES),
            default="swap",
            show_default=True,
            help="How a promoted site is changed: a second block is swapped in, or its fast "
            "path is switched off until its block is rewritten.",
        ),
        click.option("--leave", is_flag=True, help="Leave the promotions working at the end."),
        click.option("--no-progress", is_flag=True, help="No progress line on a terminal."),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return function


def make_settings(
    *,
    learn_seconds: float | None,
    max_stop_ms: float,
    policy: str,
    policy_set: tuple[str, ...],
    follow_fork: bool,
    shared_counters: bool = False,
    promote_plain: bool = False,
    change: Change = "swap",
) -> SessionSettings:
    """Return the settings that the options of ``session_options`` ask for.

    Raises:
        UsageError: if there is no such policy, or it has no such threshold or value.
    """
    # Not at the top: --help must not wait for numpy.
    from optpoline.promote.policies import policy_named

    chosen: dict[str, str] = {}
    for text in policy_set:
        name, equals, value = text.partition("=")
        if not equals or not name or not value:
            raise UsageError(f"--policy-set wants NAME=VALUE, not {text!r}")
        if name == "learn_s":
            raise UsageError("learn_s is set with --learn-seconds in a session")
        chosen[name] = value
    # Before anything is started or attached to: it may be wrong.
    policy_named(policy, chosen)
    return SessionSettings(
        learn_s=learn_seconds,
        max_stop_s=max_stop_ms / 1e3,
        follow_fork=follow_fork,
        shared_counters=shared_counters,
        promote_plain=promote_plain,
        change=change,
        policy=policy,
        policy_settings=tuple(chosen.items()),
    )
