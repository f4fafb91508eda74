# SPDX-License-Identifier: Apache-2.0
"""``optpoline cflags`` and ``ldflags``: what to tell a compiler.

Flags go to stdout and nothing else does, quoted for a shell: they are meant for
``$(optpoline cflags --plugin)``. For build systems that would rather find packages, ``cflags`` says
where these are, as one word for ``"$(...)"``.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.options import compiler_option, pass_invocation, shared_options
from optpoline.errors import UsageError
from optpoline.report.flags_document import directories_document, flags_document
from optpoline.toolchain.compiler import Compiler, find_compiler
from optpoline.toolchain.flags import Form, Mode, compile_flags, form_costs, link_flags
from optpoline.toolchain.gcc_plugin import build_plugin
from optpoline.toolchain.packages import CMAKE_PREFIX, pkg_config_path

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
@click.option(
    "--explain",
    "instead",
    flag_value="explain",
    help="Say what each form costs, and print no flags.",
)
@click.option(
    "--pkg-config-path",
    "instead",
    flag_value="pkg-config",
    help="Print where pkg-config finds optpoline, optpoline-thunks and, with --plugin,"
    " optpoline-plugin, and no flags.",
)
@click.option(
    "--cmake-prefix-path",
    "instead",
    flag_value="cmake",
    help="Print where CMake finds the package optpoline, and no flags.",
)
@shared_options
@pass_invocation
def cflags_command(
    invocation: Invocation,
    cc: str,
    plugin: bool,
    retpoline: bool,
    mode: str | None,
    instead: str | None,
) -> None:
    """Print the flags that make every indirect branch patchable.

    Without --plugin these are retpolines whose thunks `optpoline ldflags` adds;
    GCC and Clang have them. The plugin is built first if it is not there.
    """
    invocation.sink.validate_writable()
    if instead == "explain":
        if invocation.sink.path is not None:
            raise UsageError(
                "--explain writes no document",
                hint="leave out --json to read the costs, or --explain for the flags as JSON",
            )
        for cost in form_costs():
            invocation.print_data([f"{cost.form.value}: {cost.site}", f"    {cost.cost}"])
        return
    if instead == "cmake":
        _print_directories(invocation, (CMAKE_PREFIX,))
        return
    compiler, form, built = _choose(cc, plugin, retpoline, mode)
    chosen = Mode(mode or Mode.OPT_OUT.value)
    if instead == "pkg-config":
        _print_directories(invocation, pkg_config_path(compiler, plugin=built, mode=chosen))
        return
    flags = compile_flags(compiler, form, plugin=built, mode=chosen)
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


def _print_directories(invocation: Invocation, directories: Sequence[Path]) -> None:
    """Print a search path, or write its directories as JSON."""
    invocation.sink.write(directories_document(directories))
    if not invocation.sink.takes_stdout:
        # In a variable, it is quoted already: nothing but the separator counts there.
        invocation.print_data([os.pathsep.join(map(str, directories))])
