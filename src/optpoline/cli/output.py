# SPDX-License-Identifier: Apache-2.0
"""Where data goes: stdout, or a file that appears whole or not at all.

A regular file that exists is never overwritten without ``--force``. That is
checked before anything is done, so that a session of an hour does not end in
an error about its report.
"""

from __future__ import annotations

import os
import stat
import sys
from dataclasses import dataclass
from pathlib import Path

from optpoline.cli.whole_file import written_whole
from optpoline.errors import OptpolineError, UsageError
from optpoline.report.json_document import JsonObject, encode_document

__all__ = ["JsonSink"]

STDOUT = "-"


@dataclass(frozen=True, slots=True, kw_only=True)
class JsonSink:
    """The destination named by ``--json``.

    Attributes:
        path: A file name, "-" for stdout, or None where no JSON was asked for.
        force: Whether an existing file may be replaced.
    """

    path: str | None
    force: bool = False

    @property
    def takes_stdout(self) -> bool:
        """Whether the document is the data on stdout."""
        return self.path == STDOUT

    def validate_writable(self) -> None:
        """Find out now what would go wrong at the end.

        Raises:
            UsageError: if the file exists and may not be replaced.
            OptpolineError: if its directory does not exist or cannot be written.
        """
        if self.path is None or self.takes_stdout:
            return
        path = Path(self.path)
        if self._is_special(path):
            return
        if path.is_dir():
            raise UsageError(f"{path} is a directory")
        if path.exists() and not self.force:
            raise UsageError(f"{path} exists", hint="use --force to overwrite it")
        if not path.parent.is_dir():
            raise OptpolineError(f"{path} cannot be written: there is no directory {path.parent}")
        if not os.access(path.parent, os.W_OK | os.X_OK):
            raise OptpolineError(f"{path} cannot be written: no permission in {path.parent}")

    def write(self, document: JsonObject) -> None:
        """Write a document, if one was asked for.

        Raises:
            OptpolineError: if the file cannot be written; what it held is still there.
            BrokenPipeError: if nobody reads stdout any more.
        """
        if self.path is None:
            return
        text = encode_document(document)
        if self.takes_stdout:
            sys.stdout.write(text)
            sys.stdout.flush()
            return
        path = Path(self.path)
        if not self._is_special(path):
            with written_whole(path, force=self.force) as stream:
                stream.write(text.encode())
            return
        try:
            path.write_text(text)
        except OSError as error:
            raise OptpolineError(f"{path} cannot be written: {error.strerror}") from error

    @staticmethod
    def _is_special(path: Path) -> bool:
        """Whether a path is a pipe, a terminal or /dev/null: nothing there to overwrite."""
        try:
            mode = path.stat().st_mode
        except OSError:
            return False
        return not stat.S_ISREG(mode) and not stat.S_ISDIR(mode)
