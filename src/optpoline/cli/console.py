# SPDX-License-Identifier: Apache-2.0
"""Words for people on stderr: event lines, one progress line, errors.

stdout belongs to data and is written elsewhere. A reader that went away must
not end a session half way, so nothing here ever raises because of the stream.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from contextlib import suppress
from typing import TextIO

from optpoline.report.demangle import shorten_middle
from optpoline.report.table import Colour, Style, printable

__all__ = ["Console", "style_for"]

DEFAULT_WIDTH = 80
"""Characters in a line where nobody says how many there are."""

_NOTE_PREFIX = "note: "
"""Begins what a session tells when it happens, and its summary once more."""

_ERASE_LINE = "\r\x1b[K"


def style_for(stream: TextIO, colour: str, environ: Mapping[str, str] = os.environ) -> Style:
    """Decide how text on a stream may look.

    Args:
        stream: Where it goes.
        colour: "auto", "always" or "never", as asked for on the command line.
        environ: NO_COLOR wins over CLICOLOR_FORCE and FORCE_COLOR, those over the terminal.
    """
    width = shutil.get_terminal_size((DEFAULT_WIDTH, 24)).columns if _is_tty(stream) else 0
    width = width or DEFAULT_WIDTH
    if colour != "auto":
        return Style(colour=colour == "always", width=width)
    if environ.get("NO_COLOR"):
        return Style(colour=False, width=width)
    if any(environ.get(name, "0") not in {"", "0"} for name in ("FORCE_COLOR", "CLICOLOR_FORCE")):
        return Style(colour=True, width=width)
    dumb = environ.get("TERM", "") == "dumb" or environ.get("CLICOLOR") == "0"
    return Style(colour=_is_tty(stream) and not dumb, width=width)


class Console:
    """The words of one command.

    Args:
        stream: Where they go, stderr.
        style: How they may look.
        quiet: Leave out everything but errors.
        verbose: Add what is only sometimes worth telling.
        progress: Show the progress line; only if the stream is a terminal.
    """

    def __init__(
        self,
        stream: TextIO,
        style: Style,
        *,
        quiet: bool = False,
        verbose: bool = False,
        progress: bool = True,
    ) -> None:
        """Decide once whether there will be a progress line."""
        self._stream = stream
        self.style = style
        self.quiet = quiet
        self.verbose = verbose
        self.has_progress = progress and not quiet and _is_tty(stream)
        self._progress_shown = False
        self._told_notes: set[str] = set()

    def say(self, text: str) -> None:
        """Print one line, unless quiet."""
        self.say_all((text,))

    def say_all(self, lines: Iterable[str]) -> None:
        """Print lines that go together, unless quiet; a note that was told is left out."""
        if not self.quiet:
            fresh = [line for line in lines if line not in self._told_notes]
            self._told_notes.update(line for line in fresh if line.startswith(_NOTE_PREFIX))
            self._write("".join(line + "\n" for line in fresh))

    def say_more(self, text: str) -> None:
        """Print one line only if verbose."""
        if self.verbose:
            self.say(text)

    def progress(self, text: str) -> None:
        """Replace the progress line."""
        if self.has_progress:
            line = shorten_middle(printable(text), self.style.width - 1)
            self._write(self.style.paint(line, Colour.DIM))
            self._progress_shown = True

    def error(self, message: str, hint: str | None = None) -> None:
        """Print an error, also if quiet."""
        self._write(f"optpoline: {self.style.paint('error', Colour.RED)}: {printable(message)}\n")
        if hint:
            self._write(f"  {printable(hint)}\n")

    def close_progress(self) -> None:
        """Erase the progress line."""
        self._write("")

    def _write(self, text: str) -> None:
        """Write in place of the progress line, if one is shown."""
        if self._progress_shown:
            text = _ERASE_LINE + text
            self._progress_shown = False
        with suppress(OSError, ValueError):
            self._stream.write(text)
            self._stream.flush()


def _is_tty(stream: TextIO) -> bool:
    """Whether a stream is a terminal; a closed one is not."""
    try:
        return stream.isatty()
    except ValueError:
        return False
