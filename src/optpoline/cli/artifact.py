# SPDX-License-Identifier: Apache-2.0
"""Files that a verb makes beside its JSON: traces and plots.

The same rules as for ``--json``: what exists is replaced with ``--force`` only, and
that is checked first; a file appears whole or not at all.
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
        path: Its name.
        force: Whether an existing file may be replaced.
    """

    path: str
    force: bool = False

    def validate_writable(self) -> None:
        """Find out now what would go wrong at the end.

        Raises:
            UsageError: if the file exists and may not be replaced.
            OptpolineError: if its directory does not exist or cannot be written.
        """
        if self.path == "-":
            raise UsageError("stdout takes no such file", hint="name a file")
        JsonSink(path=self.path, force=self.force).validate_writable()

    def open(self) -> AbstractContextManager[BinaryIO]:
        """Open the file for writing; it appears when the block ends without an error.

        Raises:
            UsageError: if it was made in the meantime and may not be replaced.
            OptpolineError: if it cannot be written; what it held is still there.
        """
        return written_whole(Path(self.path), force=self.force)
