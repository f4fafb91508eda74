# SPDX-License-Identifier: Apache-2.0
"""The dynamic relocations of one module, read from its memory.

They tell two things: which code addresses are stored in data, even where the
program has overwritten them since; and which GOT slots lead to a symbol of
another module.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from optpoline.discover.image import ModuleImage
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.x86.decode import AddrArray

__all__ = ["Relocations", "read_relocations"]

_DT_PLTRELSZ = 2
_DT_RELA = 7
_DT_RELASZ = 8
_DT_JMPREL = 23

_R_X86_64_64 = 1
_R_X86_64_GLOB_DAT = 6
_R_X86_64_JUMP_SLOT = 7
_R_X86_64_RELATIVE = 8

_RELA_SIZE = 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Relocations:
    """Elf64_Rela[], one column each.

    Attributes:
        slots: Runtime addresses of the words relocated.
        kinds: R_X86_64_*.
        symbols: Indices into .dynsym.
        addends: As in the file.
    """

    slots: AddrArray
    kinds: AddrArray
    symbols: AddrArray
    addends: AddrArray

    def pointers(self, image: ModuleImage) -> AddrArray:
        """Return every address of the module itself that a relocation stores."""
        bias = image.module.load_bias
        relative: AddrArray = self.addends[self.kinds == _R_X86_64_RELATIVE] + bias
        is_absolute = self.kinds == _R_X86_64_64
        symbolic = zip(
            self.symbols[is_absolute].tolist(), self.addends[is_absolute].tolist(), strict=True
        )
        absolute: list[int] = []
        for index, addend in symbolic:
            value = image.dynamic_symbols.addr_of_index(index)
            if value is not None:
                absolute.append(value + addend)
        return np.concatenate((relative, np.array(absolute, dtype=np.int64)))

    def slots_of(self, symbol_indices: frozenset[int]) -> AddrArray:
        """Return the GOT slots that lead to one of the given symbols."""
        is_got = (self.kinds == _R_X86_64_JUMP_SLOT) | (self.kinds == _R_X86_64_GLOB_DAT)
        wanted = np.array(sorted(symbol_indices), dtype=np.int64)
        slots: AddrArray = self.slots[is_got & np.isin(self.symbols, wanted)]
        return slots


def read_relocations(image: ModuleImage) -> Relocations:
    """Read a module's relocations; a table that cannot be read counts as empty."""
    tables = [np.zeros((0, 3), dtype=np.int64)]
    if image.facts.dynamic is not None:
        addr, size = image.facts.dynamic
        tables += _read_tables(image, Addr(addr + image.module.load_bias), size)
    rows = np.concatenate(tables)
    return Relocations(
        slots=rows[:, 0] + image.module.load_bias,
        kinds=rows[:, 1] & 0xFFFFFFFF,
        symbols=rows[:, 1] >> 32,
        addends=rows[:, 2],
    )


def _read_tables(image: ModuleImage, dynamic: Addr, size: int) -> list[AddrArray]:
    """Read the tables that the dynamic section names, i64[n][3] each."""
    module = image.module
    try:
        raw = image.read(dynamic, size - size % 16)
        entries = np.frombuffer(raw, dtype="<i8").reshape(-1, 2).tolist()
        values: dict[int, int] = dict(reversed(entries))
        tables: list[AddrArray] = []
        for addr_tag, size_tag in ((_DT_RELA, _DT_RELASZ), (_DT_JMPREL, _DT_PLTRELSZ)):
            table, table_size = values.get(addr_tag, 0), values.get(size_tag, 0)
            # The program can write here: a size beyond the module is not believed.
            if not table or not 0 < table_size <= module.end - module.start:
                continue
            # glibc adds the load bias in place, other dynamic linkers do not.
            if not module.start <= table < module.end:
                table += module.load_bias
            rows = image.read(Addr(table), table_size - table_size % _RELA_SIZE)
            tables.append(np.frombuffer(rows, dtype="<i8").reshape(-1, 3))
    except TargetFault:
        return []
    return tables
