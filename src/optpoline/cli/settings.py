# SPDX-License-Identifier: Apache-2.0
"""What ``optpoline key`` and ``optpoline static-call`` have in common.

Both take settings as NAME=VALUE, several of which are one transaction, and list what there
is where none is given.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import ParamSpec, TypeVar

import click

from optpoline.cli.api import DeclaredHandle
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import SECONDS_OR_NONE
from optpoline.errors import UsageError

__all__ = ["DEFAULT_VALUE", "NOTES_DROPPED", "opened", "parse_settings", "timeout_option"]

DEFAULT_VALUE = "default"
"""What a key or call begins as; no C function can have that name."""

NOTES_DROPPED = "-DOPTPOLINE_DISABLE, and gold with --gc-sections, leave out what it declares"
"""Where one of them may have gone, for who has declared some."""

P = ParamSpec("P")
R = TypeVar("R")


def timeout_option(function: Callable[P, R]) -> Callable[P, R]:
    """Add the option that says how long to wait for threads that are in the way."""
    return click.option(
        "--timeout",
        "timeout_s",
        type=SECONDS_OR_NONE,
        metavar="S",
        default=2.0,
        show_default=True,
        help="How long to wait for threads that are in the way.",
    )(function)


def parse_settings(words: tuple[str, ...], value_name: str) -> list[tuple[str, str]]:
    """Take NAME=VALUE words apart, in their order.

    Raises:
        UsageError: if a word is none, or a name comes twice.
    """
    settings: dict[str, str] = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not name or not equals or not value:
            raise UsageError(f"{word!r} is not NAME={value_name}")
        if name in settings:
            raise UsageError(f"{name} is set twice")
        settings[name] = value
    return list(settings.items())


@contextmanager
def opened(invocation: Invocation, pid: int) -> Iterator[DeclaredHandle]:
    """Open a program for a block."""
    program = invocation.api.declared(pid)
    try:
        yield program
    finally:
        program.close()
