# SPDX-License-Identifier: Apache-2.0
"""``optpoline key PID NAME=on|off``: switch static keys of a running program."""

from __future__ import annotations

import click

from optpoline.cli.api import TransactionHandle
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.cli.settings import (
    DEFAULT_VALUE,
    NOTES_DROPPED,
    opened,
    parse_settings,
    timeout_option,
)
from optpoline.errors import NoSites, UsageError
from optpoline.report.json_document import keys_document
from optpoline.report.settings_text import format_keys, settings_notes

__all__ = ["key_command"]

_VALUES = "on|off|default"


@click.command("key")
@click.argument("pid", type=PID)
@click.argument("settings", metavar="[NAME=on|off|default]...", nargs=-1)
@timeout_option
@shared_options
@pass_invocation
def key_command(
    invocation: Invocation, pid: int, settings: tuple[str, ...], timeout_s: float
) -> None:
    """Switch static keys of a running program, or list them.

    Several are switched at once. They stay so when the command has ended.
    """
    invocation.sink.validate_writable()
    wanted = parse_settings(settings, _VALUES)
    for name, value in wanted:
        if value not in _VALUES.split("|"):
            raise UsageError(f"{value} is no state of the static key {name}: it is {_VALUES}")
    with opened(invocation, pid) as program:
        if not program.keys:
            raise NoSites(
                f"process {pid} declares no static key",
                hint=f"DEFINE_STATIC_KEY_FALSE of optpoline.h declares one; {NOTES_DROPPED}",
            )
        if wanted:
            transaction = program.transaction(timeout_s=timeout_s)
            for name, value in wanted:
                _add(transaction, name, value)
            transaction.commit()
        names = dict(wanted)
        keys = [key for key in program.keys if not wanted or key.name in names]
    invocation.sink.write(keys_document(pid, keys))
    if not invocation.sink.takes_stdout and not wanted:
        invocation.print_data(format_keys(keys, invocation.stdout_style()))
    console = invocation.console()
    console.say_all(f"{key.name} is {key.state.value}" for key in keys if wanted)
    console.say_all(settings_notes(keys, ()))


def _add(transaction: TransactionHandle, name: str, value: str) -> None:
    """Add one setting to a transaction."""
    key = transaction.key(name)
    if value == "on":
        key.enable()
    elif value == DEFAULT_VALUE:
        key.reset()
    else:
        key.disable()
