# SPDX-License-Identifier: Apache-2.0
"""Read files of ``/proc`` whole, with errors that name the process, and take them apart.

A file that is gone means the process is gone: ``ProcessGone``.
"""

from __future__ import annotations

import errno
import os

from optpoline.errors import OptpolineError, PermissionDenied, ProcessGone

__all__ = ["read_stat_fields", "read_status_fields", "read_text", "unescape", "wrap_error"]

_CHUNK_SIZE = 1 << 18


def read_status_fields(path: str, pid: int) -> dict[str, str]:
    """Return the lines of a status file by key."""
    fields = {}
    for line in read_text(path, pid).splitlines():
        key, _, value = line.partition(":")
        fields[key] = value.strip()
    if "State" not in fields:
        raise ProcessGone(pid)
    return fields


def read_stat_fields(path: str, pid: int) -> list[str]:
    """Return the fields of a stat file behind the name, which may contain anything."""
    text = read_text(path, pid)
    fields = text[text.rfind(")") + 2 :].split()
    if not fields:
        raise ProcessGone(pid)
    return fields


def read_text(path: str, pid: int) -> str:
    """Read a whole file of /proc, in one system call where it is small."""
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            chunks = []
            while chunk := os.read(fd, _CHUNK_SIZE):
                chunks.append(chunk)
        finally:
            os.close(fd)
    except (FileNotFoundError, ProcessLookupError) as error:
        raise ProcessGone(pid) from error
    except OSError as error:
        raise wrap_error(error, pid, path.rpartition("/")[2]) from error
    return b"".join(chunks).decode(errors="surrogateescape")


def wrap_error(error: OSError, pid: int, name: str) -> OptpolineError:
    """Turn an error of a read into one that names the process."""
    if isinstance(error, PermissionError):
        return PermissionDenied(f"we may not read {name} of process {pid}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return PermissionDenied(f"we may not read {name} of process {pid}: {error.strerror}")
    return OptpolineError(f"{name} of process {pid} cannot be read: {error.strerror}")


def unescape(text: str) -> str:
    """Undo the kernel's escape of newlines in names."""
    return text.replace("\\012", "\n") if "\\" in text else text
