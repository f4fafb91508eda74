# SPDX-License-Identifier: Apache-2.0
"""One ELF module as the program sees it: text from memory, tables from its file.

A module whose file cannot be read any more is described by its memory alone:
then it has no symbols, and functions come from the unwind table.

Everything is read when first asked for and kept. Memory is read as it was at
that time, so ask before text is changed.
"""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING, BinaryIO

import numpy as np

from optpoline.discover.elf import ElfFacts, Segment, read_at, read_elf, read_elf_headers
from optpoline.discover.functions import (
    FunctionIndex,
    FunctionTable,
    Span,
    read_frame_ranges,
    read_unwind_ranges,
)
from optpoline.discover.symbols import SymbolTable
from optpoline.discover.text import FileMemory, SegmentBytes, Text, make_text
from optpoline.discover.thunks import ThunkScan, find_thunks
from optpoline.errors import OptpolineError
from optpoline.model import Addr, Module
from optpoline.process.memory import Memory

if TYPE_CHECKING:
    from optpoline.discover.changeable import Changeable

__all__ = ["ModuleImage"]

_HEADERS_SIZE = 4096
"""Bytes of a mapped module that surely hold its ELF and program headers."""

COLD_MARK = ".cold"
"""In the symbol of a part that the compiler moved out of its function's way."""


class ModuleImage:
    """What finding sites needs to know about one module.

    Args:
        module: Which.
        memory: Where its text and data are read from, at runtime addresses.
        facts: What its headers say.
        files: What its file holds for each executable segment; none if not readable.
    """

    def __init__(
        self,
        module: Module,
        memory: Memory,
        facts: ElfFacts,
        files: tuple[SegmentBytes, ...],
    ) -> None:
        """Read nothing yet."""
        self.module = module
        self.facts = facts
        self._memory = memory
        self._files = files

    @classmethod
    def from_process(cls, module: Module, memory: Memory, elf_file: BinaryIO | None) -> ModuleImage:
        """Describe a mapped module.

        Args:
            module: Which.
            memory: The program's memory.
            elf_file: The module's file, or None where it cannot be opened; may be
                closed afterwards.

        Raises:
            UnsupportedTarget: if it is no x86-64 ELF file.
            TargetFault: if there is no file and its headers cannot be read either.
            OptpolineError: if the file cannot be read.
        """
        if elf_file is None:
            head = memory.read(module.start, _HEADERS_SIZE)
            return cls(module, memory, read_elf_headers(head, module.path), ())
        facts, files = _read_file(elf_file, module.path, executable_only=True)
        return cls(module, memory, facts, files)

    @classmethod
    def from_file(cls, path: str) -> ModuleImage:
        """Describe an ELF file on disk, at the addresses that it asks for.

        Raises:
            UnsupportedTarget: if it is no x86-64 executable or shared library.
            OptpolineError: if it cannot be read.
        """
        try:
            with open(path, "rb") as stream:
                facts, files = _read_file(stream, path, executable_only=False)
        except OSError as error:
            raise OptpolineError(f"{path} cannot be read: {error.strerror}") from error
        segments = facts.segments
        module = Module(
            path=path,
            load_bias=0,
            start=Addr(min((s.addr for s in segments), default=0)),
            end=Addr(max((s.addr + s.memory_size for s in segments), default=0)),
            mappings=(),
            is_main=facts.has_interpreter or not facts.is_position_independent,
            build_id=facts.build_id,
        )
        return cls(module, FileMemory(files), facts, files)

    @cached_property
    def code_ranges(self) -> tuple[Span, ...]:
        """Where the module's instructions are, adjacent mappings joined."""
        if self.module.mappings:
            spans = [Span(m.start, m.end) for m in self.module.mappings if m.is_executable]
        else:
            spans = [
                Span(Addr(held.segment.addr), Addr(held.segment.addr + len(held.data)))
                for held in self._files
                if held.segment.is_executable and held.data
            ]
        joined: list[Span] = []
        for span in sorted(spans, key=lambda span: span.start):
            if joined and joined[-1].end == span.start:
                span = Span(joined.pop().start, span.end)
            joined.append(span)
        return tuple(joined)

    @cached_property
    def texts(self) -> tuple[Text, ...]:
        """The module's text.

        Raises:
            TargetFault: if it cannot be read.
        """
        bias = self.module.load_bias
        code = tuple(held for held in self._files if held.segment.is_executable)
        return tuple(
            make_text(span.start, self._memory.read(span.start, span.end - span.start), code, bias)
            for span in self.code_ranges
        )

    @cached_property
    def symbols(self) -> SymbolTable:
        """Its .symtab, or its .dynsym if it is stripped."""
        raw = self.facts.symbols or self.facts.dynamic_symbols
        return SymbolTable(raw, self.module.load_bias)

    @cached_property
    def dynamic_symbols(self) -> SymbolTable:
        """Its .dynsym, whose indices relocations use."""
        return SymbolTable(self.facts.dynamic_symbols, self.module.load_bias)

    @property
    def has_file_text(self) -> bool:
        """Whether its file could be read."""
        return bool(self._files)

    @property
    def is_stripped(self) -> bool:
        """Whether only exported functions have names."""
        return self.facts.symbols is None

    @cached_property
    def functions(self) -> FunctionIndex:
        """Where its functions are."""
        bias = self.module.load_bias
        boundaries = [start + bias for start, _ in self.facts.text_sections]
        boundaries += [span.start for span in self.code_ranges]
        if self.facts.entry:
            boundaries.append(self.facts.entry + bias)
        named = FunctionTable(*self.symbols.function_ranges())
        return FunctionIndex(named, self._unwound_functions(), boundaries)

    def _unwound_functions(self) -> FunctionTable:
        """Read the unwind table: the sorted one if there is one."""
        bias = self.module.load_bias
        if self.facts.eh_frame_hdr is not None:
            addr, size = self.facts.eh_frame_hdr
            span = Span(Addr(addr + bias), Addr(addr + bias + size))
            return FunctionTable(*read_unwind_ranges(self._memory, span))
        if self.facts.eh_frame is not None:
            addr, size = self.facts.eh_frame
            span = Span(Addr(addr + bias), Addr(addr + bias + size))
            return FunctionTable(*read_frame_ranges(self._memory, span))
        none = np.zeros(0, dtype=np.int64)
        return FunctionTable(none, none)

    @cached_property
    def thunks(self) -> ThunkScan:
        """Its thunks."""
        return find_thunks(self.texts, self.symbols, lambda: self.functions)

    @cached_property
    def changeable(self) -> Changeable:
        """What of it may be changed while it runs, without our sites."""
        # Here, for what reads declarations needs this module.
        from optpoline.discover.changeable import read_changeable

        return read_changeable(self)

    def is_code(self, addr: int) -> bool:
        """Say whether an address is in its executable memory."""
        return any(addr in span for span in self.code_ranges)

    def plt_spans(self) -> tuple[Span, ...]:
        """Return its PLT sections."""
        bias = self.module.load_bias
        return tuple(
            Span(Addr(start + bias), Addr(end + bias)) for start, end in self.facts.plt_sections
        )

    def is_in_plt(self, addr: int) -> bool:
        """Say whether an address is in one of its PLT sections."""
        file_addr = addr - self.module.load_bias
        return any(start <= file_addr < end for start, end in self.facts.plt_sections)

    def is_cold_start(self, addr: int) -> bool:
        """Say whether a symbol tells that an address begins the cold part of a function."""
        named = self.symbols.name_at(addr)
        return named is not None and named[1] == 0 and COLD_MARK in named[0]

    def text_at(self, addr: int) -> Text | None:
        """Return the text that an address is in, or None."""
        return next((text for text in self.texts if addr in text), None)

    def text_sections(self) -> tuple[Span, ...]:
        """Return its executable sections; all its text if sections are not known."""
        bias = self.module.load_bias
        known = self.facts.text_sections
        spans = tuple(Span(Addr(start + bias), Addr(end + bias)) for start, end in known)
        return spans or self.code_ranges

    def is_in_text_section(self, addr: int) -> bool:
        """Say whether an address is in code proper, not in what pads or precedes it."""
        return any(addr in span for span in self.text_sections())

    def data_ranges(self) -> tuple[tuple[Addr, int], ...]:
        """Return address and size of the part of each segment that its file gives."""
        bias = self.module.load_bias
        return tuple((Addr(s.addr + bias), s.file_size) for s in self.facts.segments)

    def read(self, addr: Addr, size: int) -> bytes:
        """Read memory of the module.

        Raises:
            TargetFault: if it cannot be read.
        """
        return self._memory.read(addr, size)

    def drop_text(self) -> None:
        """Forget text that was read; it is read again, from memory alone, when needed.

        For modules without a site, most of which are large libraries.
        """
        self.__dict__.pop("texts", None)
        self.__dict__.pop("changeable", None)  # it speaks of that text
        if self.module.mappings:
            self._files = ()


def _read_file(
    stream: BinaryIO, path: str, *, executable_only: bool
) -> tuple[ElfFacts, tuple[SegmentBytes, ...]]:
    """Read the facts of a file and the bytes of its segments."""
    try:
        facts = read_elf(stream, path)
        wanted = [s for s in facts.segments if s.is_executable or not executable_only]
        return facts, tuple(_read_segment(stream, segment) for segment in wanted)
    except OSError as error:
        raise OptpolineError(f"{path} cannot be read: {error.strerror}") from error


def _read_segment(stream: BinaryIO, segment: Segment) -> SegmentBytes:
    """Read the bytes that a file holds for a segment."""
    data = read_at(stream, segment.file_off, segment.file_size)
    return SegmentBytes(segment=segment, data=data)
