# SPDX-License-Identifier: Apache-2.0
"""Files that a verb makes beside its JSON: traces, plots, plugins.

The same rules as for ``--json``: what exists is replaced with ``--force`` only, and
that is checked first; a file appears whole or not at all. A file is renamed to its
place, so a device or a pipe is no place for it, with ``--force`` neither.
"""

from __future__ import annotations

from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from optpoline.cli.output import JsonSink
from optpoline.cli.whole_file import written_whole
from optpoline.errors import UsageError

__all__ = ["Artifact"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Artifact:
    """One file to be made.

    Attributes:
        option: What names it on the command line.
        path: Its name.
        force: Whether an existing file may be replaced.
    """

    option: str
    path: str
    force: bool = False

    def validate_replaceable(self) -> None:
        """Check that nothing is there, or what may be replaced.

        Raises:
            UsageError: if the file exists and may not be replaced, or there can be none.
        """
        if self.path == "-":
            raise UsageError(f"stdout takes no file of {self.option}", hint="name a file")
        path = Path(self.path)
        if path.exists() and not path.is_file():
            raise UsageError(
                f"{path} is no regular file", hint=f"name another file with {self.option}"
            )
        if path.exists() and not self.force:
            raise UsageError(f"{path} exists", hint="use --force to overwrite it")

    def validate_writable(self) -> None:
        """Find out now what would go wrong at the end.

        Raises:
            UsageError: if the file exists and may not be replaced, or there can be none.
            OptpolineError: if its directory does not exist or cannot be written.
        """
        self.validate_replaceable()
        JsonSink(path=self.path, force=self.force).validate_writable()

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Open the file for writing; it appears when the block ends without an error.

        Raises:
            UsageError: if it was made in the meantime and may not be replaced.
            OptpolineError: if it cannot be written; what it held is still there.
        """
        return written_whole(Path(self.path), force=self.force)
