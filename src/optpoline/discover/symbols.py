# SPDX-License-Identifier: Apache-2.0
"""Symbols of one module: which function an address is in, by name.

Tables are parsed with numpy and names decoded one by one when asked for, for a
table may hold 100,000 symbols of which a handful is ever shown.
"""

from __future__ import annotations

from bisect import bisect_right
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from optpoline.discover.elf import RawSymbols
from optpoline.model import Addr
from optpoline.x86.decode import AddrArray

__all__ = ["SymbolTable"]

_SYMBOL_DTYPE = np.dtype(
    [
        ("name_off", "<u4"),
        ("info", "u1"),
        ("other", "u1"),
        ("section", "<u2"),
        ("value", "<i8"),
        ("size", "<i8"),
    ]
)
"""Elf64_Sym."""

_STT_NOTYPE = 0
_STT_FUNC = 2
_STT_GNU_IFUNC = 10
_SHN_UNDEF = 0
_SHN_ABS = 0xFFF1


class SymbolTable:
    """The code symbols of one module, at their runtime addresses.

    Args:
        raw: The table, or None for a module that has none.
        load_bias: What to add to the values.
    """

    def __init__(self, raw: RawSymbols | None, load_bias: int) -> None:
        """Parse the table; names stay undecoded."""
        self._names = raw.names if raw else b""
        entries = raw.entries if raw else b""
        n_whole = len(entries) // _SYMBOL_DTYPE.itemsize
        self._all = np.frombuffer(entries, dtype=_SYMBOL_DTYPE, count=n_whole)
        self._load_bias = load_bias

    @cached_property
    def _code(self) -> NDArray[np.void]:
        """Defined functions and labels, by address; sized functions first at each."""
        table = self._all
        kind = table["info"] & 0xF
        is_code = (kind == _STT_FUNC) | (kind == _STT_GNU_IFUNC) | (kind == _STT_NOTYPE)
        is_defined = (table["section"] != _SHN_UNDEF) & (table["section"] != _SHN_ABS)
        has_name = table["name_off"] != 0
        code = table[is_code & is_defined & has_name]
        rank = (code["info"] & 0xF == _STT_NOTYPE).astype(np.int64)
        order = np.lexsort((-code["size"], rank, code["value"]))
        code = code[order]
        is_first = np.ones(code.size, dtype=np.bool_)
        is_first[1:] = code["value"][1:] != code["value"][:-1]
        unique: NDArray[np.void] = code[is_first]
        return unique

    @cached_property
    def _starts(self) -> list[int]:
        """Address of each code symbol, sorted."""
        values: list[int] = (self._code["value"] + self._load_bias).tolist()
        return values

    @cached_property
    def _ends(self) -> list[int]:
        """Address after each code symbol; without a size it lasts until the next."""
        ends = self._code["value"] + self._code["size"]
        following = np.append(self._code["value"][1:], np.iinfo(np.int64).max - self._load_bias)
        has_size = self._code["size"] > 0
        values: list[int] = (np.where(has_size, ends, following) + self._load_bias).tolist()
        return values

    @cached_property
    def _name_offs(self) -> list[int]:
        """Where the name of each code symbol begins."""
        values: list[int] = self._code["name_off"].tolist()
        return values

    def function_ranges(self) -> tuple[AddrArray, AddrArray]:
        """Return start and size of each function (labels left out), size 0 if not known."""
        functions = self._code[self._code["info"] & 0xF != _STT_NOTYPE]
        return functions["value"] + self._load_bias, functions["size"].copy()

    def name_at(self, addr: int) -> tuple[str, int] | None:
        """Return the symbol that an address is in and the offset from it, or None."""
        index = bisect_right(self._starts, addr) - 1
        if index < 0 or addr >= self._ends[index]:
            return None
        return self._name(self._name_offs[index]), addr - self._starts[index]

    def find_containing(self, marks: tuple[bytes, ...]) -> list[tuple[str, Addr, int]]:
        """Find defined symbols whose name contains one of some strings.

        A table without any costs one search of its strings for each.

        Returns:
            Name, address and size of each, aliases included.
        """
        return [
            (self._name(int(entry["name_off"])), self._addr(entry), int(entry["size"]))
            for entry in self._all[self._is_matching(marks)]
            if entry["section"] != _SHN_UNDEF
        ]

    def find_functions(self, name: str) -> list[tuple[Addr, bool]]:
        """Find the defined functions and labels of a name.

        Returns:
            Address of each, aliases included, and whether it is an indirect function: one
            that is called once and returns the function that is meant.
        """
        code = (_STT_FUNC, _STT_GNU_IFUNC, _STT_NOTYPE)
        return [
            (self._addr(entry), bool(entry["info"] & 0xF == _STT_GNU_IFUNC))
            for entry in self._all[self._is_matching((name.encode(),))]
            if entry["section"] not in (_SHN_UNDEF, _SHN_ABS)
            and entry["info"] & 0xF in code
            and self._name(int(entry["name_off"])) == name
        ]

    def undefined_containing(self, marks: tuple[bytes, ...]) -> frozenset[int]:
        """Return table indices of undefined symbols whose name contains one of some strings."""
        indices = np.flatnonzero(self._is_matching(marks) & (self._all["section"] == _SHN_UNDEF))
        return frozenset(indices.tolist())

    def addr_of_index(self, index: int) -> Addr | None:
        """Return the address of a table entry, or None if it is undefined here."""
        if index >= self._all.size or self._all["section"][index] == _SHN_UNDEF:
            return None
        return self._addr(self._all[index])

    def _is_matching(self, marks: tuple[bytes, ...]) -> NDArray[np.bool_]:
        """Tell for each entry whether its name contains one of ``marks``."""
        spans = [span for mark in marks for span in self._name_spans(mark)]
        matching = np.zeros(self._all.size, dtype=np.bool_)
        for start, mark_off in spans:
            # Linkers share tails: a name may begin anywhere in a longer string.
            matching |= (self._all["name_off"] >= start) & (self._all["name_off"] <= mark_off)
        return matching

    def _name_spans(self, mark: bytes) -> list[tuple[int, int]]:
        """Return (start of the string, position of ``mark``) for each occurrence in the names."""
        spans: list[tuple[int, int]] = []
        pos = self._names.find(mark)
        while pos >= 0:
            spans.append((self._names.rfind(b"\0", 0, pos) + 1, pos))
            pos = self._names.find(mark, pos + 1)
        return spans

    def _name(self, name_off: int) -> str:
        """Decode one name."""
        end = self._names.find(b"\0", name_off)
        return self._names[name_off:end].decode("utf-8", "replace")

    def _addr(self, entry: np.void) -> Addr:
        """Return the runtime address of an entry."""
        return Addr(int(entry["value"]) + self._load_bias)
