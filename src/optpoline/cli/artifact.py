# SPDX-License-Identifier: Apache-2.0
"""Files that a verb makes beside its JSON: traces and plots.

The same rules as for ``--json``: what exists is replaced with ``--force`` only, and
that is checked first; a file appears whole or not at all.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from optpoline.cli.output import JsonSink
from optpoline.errors import OptpolineError, UsageError

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

    @contextmanager
    def open(self) -> Iterator[BinaryIO]:
        """Open the file for writing; it appears when the block ends without an error.

        Raises:
            OptpolineError: if it cannot be written; what it held is still there.
        """
        path = Path(self.path)
        draft = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with draft.open("xb") as stream:
                yield stream
            self._put_in_place(draft, path)
        except OSError as error:
            raise OptpolineError(f"{path} cannot be written: {error.strerror}") from error
        finally:
            with suppress(OSError):
                draft.unlink()

    def _put_in_place(self, draft: Path, path: Path) -> None:
        """Give the whole file its name."""
        if self.force:
            draft.replace(path)
            return
        try:
            # Unlike a rename, a link does not replace a file made in the meantime.
            os.link(draft, path)
        except FileExistsError as error:
            raise UsageError(f"{path} exists", hint="use --force to overwrite it") from error
