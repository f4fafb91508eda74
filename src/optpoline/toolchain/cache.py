# SPDX-License-Identifier: Apache-2.0
"""What can be made again: the user's cache directory, and files that appear in it whole.

Names in the cache say what files were made from, so what is there is right. Two who make the same
file at a time do no harm: each writes one of its own and then gives it its name.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from optpoline.errors import ToolchainError

__all__ = ["cache_dir", "drafted"]


def cache_dir() -> Path:
    """Return the directory where this user's programs keep what they can make again.

    Raises:
        ToolchainError: if there is no home directory.
    """
    chosen = os.environ.get("XDG_CACHE_HOME", "")
    # The specification says that a relative path is to be ignored.
    if os.path.isabs(chosen):
        return Path(chosen) / "optpoline"
    try:
        return Path.home() / ".cache" / "optpoline"
    except RuntimeError as error:
        raise ToolchainError(
            "there is no home directory to keep what is built in",
            hint="set XDG_CACHE_HOME to a directory",
        ) from error


@contextmanager
def drafted(path: Path) -> Iterator[Path]:
    """Give an empty file to fill, which then becomes the one at a path.

    Args:
        path: What is to appear; its directory is made.

    Raises:
        ToolchainError: if it cannot be written. What was there, is there, as it is whenever the
            body fails.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=".", suffix=path.suffix, dir=path.parent)
        os.close(handle)
    except OSError as error:
        raise ToolchainError(f"{path} cannot be written: {error.strerror}") from error
    draft = Path(name)
    try:
        yield draft
        draft.replace(path)
    except OSError as error:
        raise ToolchainError(f"{path} cannot be written: {error.strerror}") from error
    finally:
        with suppress(OSError):
            draft.unlink()
