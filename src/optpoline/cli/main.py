# SPDX-License-Identifier: Apache-2.0
"""The entry point: the only place where errors become words and an exit status.

Exit codes: 0 ok (also when nothing was hot), 1 other error, 2 usage, 3 no site
in the target, 4 target gone, 5 permission, 6 unsupported target, 7 refused or
rolled back, 130 interrupted, 141 nobody reads the output, 143 and 129 ended by
SIGTERM and SIGHUP. ``run`` passes on the status of its child; its own
failures are 125, 126 and 127.

Subcommands are imported when they are needed.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

import click

from optpoline.cli.api import Api, LiveApi
from optpoline.cli.invocation import Invocation
from optpoline.cli.output import JsonSink
from optpoline.errors import OptpolineError, UsageError
from optpoline.report.json_document import error_document

__all__ = ["command_group", "main"]

EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
EXIT_RUN_FAILED = 125

_PROGRAM = "optpoline"
_COMPLETION_VARIABLE = "_OPTPOLINE_COMPLETE"
_VERBS = (
    *("run", "attach", "status", "check", "detach", "sites", "key", "static-call"),
    *("doctor", "record", "simulate", "cflags", "ldflags", "plugin"),
)


class _VerbGroup(click.Group):
    """The verbs, each imported when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the verbs in the order in which one meets them."""
        return list(_VERBS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import one verb."""
        match cmd_name:
            case "run":
                from optpoline.cli.run import run_command

                return run_command
            case "attach":
                from optpoline.cli.attach import attach_command

                return attach_command
            case "status":
                from optpoline.cli.status import status_command

                return status_command
            case "check":
                from optpoline.cli.check import check_command

                return check_command
            case "detach":
                from optpoline.cli.detach import detach_command

                return detach_command
            case "sites":
                from optpoline.cli.sites import sites_command

                return sites_command
            case "key":
                from optpoline.cli.key import key_command

                return key_command
            case "static-call":
                from optpoline.cli.static_call import static_call_command

                return static_call_command
            case "doctor":
                from optpoline.cli.doctor import doctor_command

                return doctor_command
            case "record":
                from optpoline.cli.record import record_command

                return record_command
            case "simulate":
                from optpoline.cli.simulate import simulate_command

                return simulate_command
            case "cflags":
                from optpoline.cli.flags import cflags_command

                return cflags_command
            case "ldflags":
                from optpoline.cli.flags import ldflags_command

                return ldflags_command
            case "plugin":
                from optpoline.cli.plugin import plugin_command

                return plugin_command
            case _:
                return None

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Note the verb before its options are parsed: its failures may have their own code."""
        name, command, rest = super().resolve_command(ctx, args)
        invocation = ctx.find_object(Invocation)
        if invocation is not None and name is not None:
            invocation.verb = name
            if name == "run":
                invocation.failure_exit_code = EXIT_RUN_FAILED
        return name, command, rest


@click.group(
    cls=_VerbGroup,
    no_args_is_help=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 80},
)
@click.version_option(package_name=_PROGRAM, prog_name=_PROGRAM)
def command_group() -> None:
    """Make a program built with retpolines fast again, while it runs.

    optpoline learns which targets the program's indirect branches really take,
    and lets it branch there directly. Nothing is rebuilt or restarted, and in
    the end every byte is put back.
    """


def main(argv: Sequence[str] | None = None, *, api: Api | None = None) -> int:
    """Run one command and return its exit status.

    Args:
        argv: Arguments without the program's name, or None for those of the process.
        api: What to work on, or None for the real thing.
    """
    args = list(sys.argv[1:] if argv is None else argv)
    invocation = Invocation(api=LiveApi() if api is None else api)
    try:
        exit_code = _invoke(args, invocation)
        sys.stdout.flush()
    except BrokenPipeError:
        _give_up_stdout()
        exit_code = EXIT_BROKEN_PIPE
    except (KeyboardInterrupt, click.Abort):
        exit_code = EXIT_INTERRUPTED
    return exit_code


def _invoke(args: list[str], invocation: Invocation) -> int:
    """Run one command; turn what it raises for its user into words."""
    instruction = os.environ.get(_COMPLETION_VARIABLE)
    if instruction:
        from click.shell_completion import shell_complete

        return shell_complete(command_group, {}, _PROGRAM, _COMPLETION_VARIABLE, instruction)
    try:
        with command_group.make_context(_PROGRAM, args, obj=invocation) as context:
            command_group.invoke(context)
    except click.exceptions.Exit as request:
        return request.exit_code
    except click.ClickException as error:
        if invocation.sink.path is None:
            invocation.sink = _find_sink(args)
        return _fail(_usage_error(error), invocation)
    except OptpolineError as error:
        return _fail(error, invocation)
    except BrokenPipeError:
        raise
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _fail(OptpolineError(f"{where}{error.strerror or error}"), invocation)
    return invocation.exit_code


def _fail(error: OptpolineError, invocation: Invocation) -> int:
    """Say what went wrong, to people and to scripts; return the exit code."""
    exit_code = invocation.failure_exit_code or error.exit_code
    console = invocation.console()
    console.error(error.message, error.hint)
    try:
        invocation.sink.validate_writable()
        invocation.sink.write(error_document(error, exit_code))
    except OptpolineError as second:
        # The error itself may be about that file.
        if second.message != error.message:
            console.error(second.message, second.hint)
    return exit_code


def _usage_error(error: click.ClickException) -> UsageError:
    """Return click's complaint as one of ours."""
    context = error.ctx if isinstance(error, click.UsageError) else None
    path = context.command_path if context is not None else _PROGRAM
    message = error.format_message().rstrip(".")
    return UsageError(message, hint=f"`{path} --help` shows what there is")


def _find_sink(args: list[str]) -> JsonSink:
    """Find --json in a command line that could not be parsed."""
    own = args[: args.index("--")] if "--" in args else args
    for number, arg in enumerate(own):
        if arg == "--json" and number + 1 < len(own):
            return JsonSink(path=own[number + 1], force="--force" in own or "-f" in own)
        if arg.startswith("--json="):
            return JsonSink(path=arg.removeprefix("--json="), force="--force" in own or "-f" in own)
    return JsonSink(path=None)


def _give_up_stdout() -> None:
    """Let the interpreter's last flush go nowhere: it would complain about the pipe."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 1)
    os.close(devnull)
