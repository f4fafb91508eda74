# SPDX-License-Identifier: Apache-2.0
"""How large the parts of a file are that are loaded and never written."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile

__all__ = ["Sizes", "read_sizes"]

_NOTES = "optpoline_"


@dataclass(frozen=True, slots=True, kw_only=True)
class Sizes:
    """Sizes in bytes.

    Attributes:
        text: Of code.
        notes: Of notes, without the strings that they refer to.
        read_only: Of all that is loaded and never written: code, notes, constants (strings
            of notes among them), unwind tables.
    """

    text: int
    notes: int
    read_only: int


def read_sizes(path: Path) -> Sizes:
    """Add up the sections of a file."""
    text = notes = read_only = 0
    with path.open("rb") as stream:
        for section in ELFFile(stream).iter_sections():
            flags, size = int(section["sh_flags"]), int(section["sh_size"])
            if not flags & SH_FLAGS.SHF_ALLOC or flags & SH_FLAGS.SHF_WRITE:
                continue
            read_only += size
            if flags & SH_FLAGS.SHF_EXECINSTR:
                text += size
            if section.name.startswith(_NOTES):
                notes += size
    return Sizes(text=text, notes=notes, read_only=read_only)
