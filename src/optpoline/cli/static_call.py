# SPDX-License-Identifier: Apache-2.0
"""``optpoline static-call PID NAME=FUNCTION``: give static calls other targets."""

from __future__ import annotations

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.cli.settings import (
    DEFAULT_VALUE,
    NOTES_DROPPED,
    opened,
    parse_settings,
    timeout_option,
)
from optpoline.errors import NoSites
from optpoline.report.json_document import static_calls_document
from optpoline.report.settings_text import format_static_calls, settings_notes

__all__ = ["static_call_command"]


@click.command("static-call")
@click.argument("pid", type=PID)
@click.argument("settings", metavar="[NAME=FUNCTION]...", nargs=-1)
@click.option(
    "--any-function",
    is_flag=True,
    help="Take any function of the symbol tables, though nobody has compared its type.",
)
@timeout_option
@shared_options
@pass_invocation
def static_call_command(
    invocation: Invocation,
    pid: int,
    settings: tuple[str, ...],
    any_function: bool,
    timeout_s: float,
) -> None:
    """Give static calls of a program other targets, or list them.

    FUNCTION is a target that the source declares, module:function where several modules have
    one, or "default" for what the call began with. Several are changed at once, and stay so
    when the command has ended.
    """
    invocation.sink.validate_writable()
    wanted = parse_settings(settings, "FUNCTION")
    console = invocation.console()
    with opened(invocation, pid) as program:
        before = program.static_calls
        if not before:
            raise NoSites(
                f"process {pid} declares no static call",
                hint=f"DEFINE_STATIC_CALL of optpoline.h declares one; {NOTES_DROPPED}",
            )
        if wanted:
            transaction = program.transaction(timeout_s=timeout_s)
            for name, function in wanted:
                call = transaction.static_call(name)
                if function == DEFAULT_VALUE:
                    call.reset()
                else:
                    call.update(function, any_function=any_function)
            transaction.commit()
        names = dict(wanted)
        calls = [call for call in program.static_calls if not wanted or call.name in names]
    declared = {(call.name, target) for call in before for target in call.targets}
    if any(one not in declared and one[1] != DEFAULT_VALUE for one in wanted):
        console.say("note: nobody has compared the function's type with the static call's")
    invocation.sink.write(static_calls_document(pid, calls))
    if not invocation.sink.takes_stdout and not wanted:
        invocation.print_data(format_static_calls(calls, invocation.stdout_style()))
    console.say_all(f"{call.name} calls {call.target or 'several'}" for call in calls if wanted)
    console.say_all(settings_notes((), calls))
