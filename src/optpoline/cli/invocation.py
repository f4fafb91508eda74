# SPDX-License-Identifier: Apache-2.0
"""What one call of the command line carries from option parsing to its end."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field

from optpoline.cli.api import Api
from optpoline.cli.console import Console, style_for
from optpoline.cli.output import JsonSink
from optpoline.report.table import Style

__all__ = ["Invocation"]


@dataclass(slots=True, kw_only=True)
class Invocation:
    """One call; filled in while its options are parsed, so that errors can use it.

    Attributes:
        api: What the subcommands are written on.
        verb: The subcommand, "" until known.
        colour: The ``--color`` option.
        quiet: The ``--quiet`` option.
        verbose: The ``--verbose`` option.
        progress: False with ``--no-progress``.
        sink: Where JSON goes.
        exit_code: What a command that did not fail exits with.
        failure_exit_code: What a failure exits with, or None for the error's own code.
    """

    api: Api
    verb: str = ""
    colour: str = "auto"
    quiet: bool = False
    verbose: bool = False
    progress: bool = True
    sink: JsonSink = field(default_factory=lambda: JsonSink(path=None))
    exit_code: int = 0
    failure_exit_code: int | None = None

    def console(self) -> Console:
        """Return the console for words (stderr)."""
        return Console(
            sys.stderr,
            style_for(sys.stderr, self.colour),
            quiet=self.quiet,
            verbose=self.verbose,
            progress=self.progress,
        )

    def stdout_style(self) -> Style:
        """Return how data on stdout may look."""
        return style_for(sys.stdout, self.colour)

    def print_data(self, lines: list[str]) -> None:
        """Write lines of data to stdout.

        Raises:
            BrokenPipeError: if nobody reads it any more.
        """
        sys.stdout.write("".join(line + "\n" for line in lines))
        sys.stdout.flush()
