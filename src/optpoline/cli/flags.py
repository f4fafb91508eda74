# SPDX-License-Identifier: Apache-2.0
"""``optpoline cflags`` and ``ldflags``: what to tell a compiler.

Flags go to stdout and nothing else does, quoted for a shell: they are meant for
``$(optpoline cflags --plugin)``.
"""

from __future__ import annotations

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.options import compiler_option, pass_invocation, shared_options
from optpoline.errors import UsageError
from optpoline.report.flags_document import flags_document
from optpoline.toolchain.compiler import Compiler, find_compiler
from optpoline.toolchain.flags import Form, Mode, compile_flags, form_costs, link_flags
from optpoline.toolchain.gcc_plugin import build_plugin

__all__ = ["cflags_command", "ldflags_command"]

P = ParamSpec("P")
R = TypeVar("R")


def _form_options(function: Callable[P, R]) -> Callable[P, R]:
    """Add the options that say what indirect branches are to become."""
    decorators = [
        click.option("--plugin", is_flag=True, help="Mark branches with the GCC plugin."),
        click.option(
            "--retpoline",
            is_flag=True,
            help="Make retpolines also with --plugin; without it they are made anyway.",
        ),
        click.option(
            "--mode",
            type=click.Choice([mode.value for mode in Mode]),
            help="With --plugin: all branches but those marked no_optpoline may be changed"
            " (opt-out), or only those marked optpoline (opt-in).",
        ),
    ]
    for decorate in reversed(decorators):
        function = decorate(function)
    return compiler_option(function)


@click.command("cflags")
@_form_options
@click.option("--explain", is_flag=True, help="Say what each form costs, and print no flags.")
@shared_options
@pass_invocation
def cflags_command(
    invocation: Invocation, cc: str, plugin: bool, retpoline: bool, mode: str | None, explain: bool
) -> None:
    """Print the flags that make every indirect branch patchable.

    Without --plugin these are retpolines whose thunks `optpoline ldflags` adds;
    GCC and Clang have them. The plugin is built first if it is not there.
    """
    invocation.sink.validate_writable()
    if explain:
        for cost in form_costs():
            invocation.print_data([f"{cost.form.value}: {cost.site}", f"    {cost.cost}"])
        return
    compiler, form, built = _choose(cc, plugin, retpoline, mode)
    flags = compile_flags(compiler, form, plugin=built, mode=Mode(mode or Mode.OPT_OUT.value))
    _print_flags(invocation, "cflags", compiler, flags)


@click.command("ldflags")
@_form_options
@shared_options
@pass_invocation
def ldflags_command(
    invocation: Invocation, cc: str, plugin: bool, retpoline: bool, mode: str | None
) -> None:
    """Print the flags to link with what `cflags` was used for.

    Give it the same options. Thunks come as a source file in assembly, for each
    program and each shared library.
    """
    invocation.sink.validate_writable()
    compiler, form, built = _choose(cc, plugin, retpoline, mode)
    flags = link_flags(form, plugin=built, mode=Mode(mode or Mode.OPT_OUT.value))
    _print_flags(invocation, "ldflags", compiler, flags)


def _choose(
    cc: str, plugin: bool, retpoline: bool, mode: str | None
) -> tuple[Compiler, Form, Path | None]:
    """Return what the options ask for, with the plugin where that has one."""
    if mode is not None and not plugin:
        raise UsageError("--mode is the plugin's", hint="give --plugin as well")
    compiler = find_compiler(cc)
    if not plugin:
        return compiler, Form.RETPOLINE, None
    form = Form.MARKED_RETPOLINE if retpoline else Form.MARKED
    return compiler, form, build_plugin(compiler)


def _print_flags(
    invocation: Invocation, command: str, compiler: Compiler, flags: Sequence[str]
) -> None:
    """Print flags, or write them as JSON."""
    invocation.sink.write(flags_document(command, compiler, flags))
    if not invocation.sink.takes_stdout:
        invocation.print_data([shlex.join(flags)])
