# SPDX-License-Identifier: Apache-2.0
"""A file that appears whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

from optpoline.errors import OptpolineError, UsageError

__all__ = ["written_whole"]


@contextmanager
def written_whole(path: Path, *, force: bool) -> Iterator[BinaryIO]:
    """Open a draft beside a file; it takes the file's place when the block ends without an error.

    Args:
        path: The file.
        force: Whether an existing file is replaced.

    Raises:
        UsageError: if it exists and may not be replaced.
        OptpolineError: if it cannot be written; what it held is still there.
    """
    draft = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with draft.open("wb") as stream:
            yield stream
        if force:
            draft.replace(path)
        else:
            # Unlike a rename, a link does not replace a file made in the meantime.
            os.link(draft, path)
    except FileExistsError as error:
        raise UsageError(f"{path} exists", hint="use --force to overwrite it") from error
    except OSError as error:
        raise OptpolineError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            draft.unlink()
