# SPDX-License-Identifier: Apache-2.0
"""What a process looks like from outside: text, mappings, memory, open files.

Read from /proc with code of our own, so that a mistake in optpoline's reading of the same
files does not hide itself.
"""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path

from torture.errors import TortureError

__all__ = ["Footprint", "list_changes"]

ARENA = "memfd:optpoline"

_Span = tuple[int, int, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Footprint:
    """A process at one moment.

    Attributes:
        text: SHA-256 of every file-backed r-x mapping, by (start, end, path).
        n_arenas: Mappings of arenas of ours.
        n_mappings: All lines of its memory map.
        vm_kib: Its address space, VmSize.
        rss_kib: Its resident memory, from smaps_rollup: exact, as VmRSS is not.
        fds: What it has open, by number.
    """

    text: dict[_Span, str]
    n_arenas: int
    n_mappings: int
    vm_kib: int
    rss_kib: int
    fds: dict[int, str]

    @classmethod
    def of(cls, pid: int) -> Footprint:
        """Take it.

        Raises:
            TortureError: if the process is gone.
        """
        try:
            lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
            return cls(
                text=_hash_text(pid, lines),
                n_arenas=sum(ARENA in line for line in lines),
                n_mappings=len(lines),
                vm_kib=_read_kib(f"/proc/{pid}/status", "VmSize:"),
                rss_kib=_read_kib(f"/proc/{pid}/smaps_rollup", "Rss:"),
                fds=_list_fds(pid),
            )
        except OSError as error:
            raise TortureError(f"process {pid} cannot be looked at: {error}") from error


def list_changes(before: Footprint, after: Footprint) -> list[str]:
    """Say what is not as it was; resident memory is left to the caller."""
    changes: list[str] = []
    if before.text.keys() != after.text.keys():
        changes.append("executable mappings came or went")
    changes += [
        f"text of {path} at {start:#x} changed"
        for (start, end, path), digest in before.text.items()
        if after.text.get((start, end, path), digest) != digest
    ]
    if after.n_arenas:
        changes.append(f"{after.n_arenas} mappings of an arena are left")
    if before.n_mappings != after.n_mappings:
        changes.append(f"{before.n_mappings} mappings became {after.n_mappings}")
    if before.vm_kib != after.vm_kib:
        changes.append(f"address space of {before.vm_kib} KiB became {after.vm_kib} KiB")
    if before.fds != after.fds:
        changes.append(f"open files {before.fds} became {after.fds}")
    return changes


def _hash_text(pid: int, lines: list[str]) -> dict[_Span, str]:
    """Read and hash every executable mapping of a file, ours left out."""
    text: dict[_Span, str] = {}
    memory = os.open(f"/proc/{pid}/mem", os.O_RDONLY | os.O_CLOEXEC)
    try:
        for line in lines:
            span, permissions, _, _, inode, *path = line.split(maxsplit=5)
            if "x" not in permissions or inode == "0" or ARENA in line:
                continue
            start, end = (int(number, 16) for number in span.split("-"))
            data = os.pread(memory, end - start, start)
            if len(data) != end - start:
                raise TortureError(f"only {len(data)} bytes at {start:#x} of process {pid}")
            text[start, end, path[0]] = hashlib.sha256(data).hexdigest()
    finally:
        os.close(memory)
    return text


def _read_kib(path: str, field: str) -> int:
    """Read one field of a /proc file that counts in kB."""
    for line in Path(path).read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise TortureError(f"{path} has no {field}")


def _list_fds(pid: int) -> dict[int, str]:
    """Return what a process has open."""
    folder = f"/proc/{pid}/fd"
    return {int(name): os.readlink(f"{folder}/{name}") for name in os.listdir(folder)}
