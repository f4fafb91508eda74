# SPDX-License-Identifier: Apache-2.0
"""The executable bytes that a program's files hold, at the addresses they are mapped at."""

from __future__ import annotations

import struct
from dataclasses import dataclass

from optpoline.discover.elf import read_at, read_elf
from optpoline.errors import OptpolineError, TargetFault
from optpoline.model import Addr, Module
from optpoline.process.memory import Memory
from optpoline.process.modules import open_module

__all__ = ["ModuleFile", "read_module_file"]

# System V gABI: an entry of the dynamic section, its tags and flags.
_DYNAMIC_ENTRY = struct.Struct("<QQ")
_DT_NULL, _DT_TEXTREL, _DT_FLAGS = 0, 22, 30
_DF_TEXTREL = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleFile:
    """What one mapped file says its text is.

    Attributes:
        path: As the program names it.
        segments: (address, bytes) of each executable segment.
        has_text_relocations: Whether the dynamic linker changes its text.
    """

    path: str
    segments: tuple[tuple[Addr, bytes], ...]
    has_text_relocations: bool

    def has(self, addr: int) -> bool:
        """Tell whether an address is in its text."""
        return any(start <= addr < start + len(data) for start, data in self.segments)

    def read(self, addr: int, size: int) -> bytes:
        """Return bytes of its text as the file has them; none if it has not all."""
        for start, data in self.segments:
            if start <= addr and addr + size <= start + len(data):
                return data[addr - start : addr - start + size]
        return b""


def read_module_file(pid: int, module: Module, memory: Memory) -> ModuleFile | None:
    """Read the very file that is mapped; None if it cannot be had, or is no ELF file any more."""
    stream = open_module(pid, module)
    if stream is None:
        return None
    with stream:
        try:
            facts = read_elf(stream, module.path)
        except (OptpolineError, OSError):
            return None
        segments = tuple(
            (Addr(module.load_bias + one.addr), read_at(stream, one.file_off, one.file_size))
            for one in facts.segments
            if one.is_executable
        )
    return ModuleFile(
        path=module.path,
        segments=segments,
        has_text_relocations=_has_text_relocations(module, facts.dynamic, memory),
    )


def _has_text_relocations(module: Module, dynamic: tuple[int, int] | None, memory: Memory) -> bool:
    """Tell from a module's dynamic section whether its text is relocated."""
    if dynamic is None:
        return False
    addr, size = dynamic
    try:
        data = memory.read(module.load_bias + addr, size - size % _DYNAMIC_ENTRY.size)
    except TargetFault:
        return False
    for tag, value in _DYNAMIC_ENTRY.iter_unpack(data):
        if tag == _DT_NULL:
            return False
        if tag == _DT_TEXTREL or (tag == _DT_FLAGS and value & _DF_TEXTREL):
            return True
    return False
