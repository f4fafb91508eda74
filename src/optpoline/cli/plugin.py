# SPDX-License-Identifier: Apache-2.0
"""``optpoline plugin build``: the GCC plugin, built for the compiler that is to load it."""

from __future__ import annotations

from pathlib import Path

import click

from optpoline.cli.artifact import Artifact
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import compiler_option, pass_invocation, shared_options
from optpoline.report.flags_document import plugin_document
from optpoline.toolchain.compiler import find_compiler
from optpoline.toolchain.gcc_plugin import build_plugin

__all__ = ["plugin_command"]


@click.group("plugin", no_args_is_help=False)
def plugin_command() -> None:
    """Work on the GCC plugin that marks every indirect branch."""


@plugin_command.command("build")
@compiler_option
@click.option("--output", metavar="FILE.so", help="Where to put it (the user's cache).")
@shared_options
@pass_invocation
def build_command(invocation: Invocation, cc: str, output: str | None) -> None:
    """Build the GCC plugin for a compiler; print its path.

    Needs the plugin headers of that compiler (on Debian gcc-12-plugin-dev for
    GCC 12) and its C++ compiler. What is in the cache is not built again.
    """
    invocation.sink.validate_writable()
    if output is not None:
        # Its directory is made where there is none.
        artifact = Artifact(option="--output", path=output, force=invocation.sink.force)
        artifact.validate_replaceable()
    compiler = find_compiler(cc)
    path = build_plugin(compiler, output=None if output is None else Path(output))
    invocation.sink.write(plugin_document(compiler, path))
    if not invocation.sink.takes_stdout:
        invocation.print_data([str(path)])
    invocation.console().say(f"for {compiler.name}")
