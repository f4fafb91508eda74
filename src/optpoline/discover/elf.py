# SPDX-License-Identifier: Apache-2.0
"""The few facts of an ELF file that finding sites needs.

Headers are read with pyelftools; tables that may hold 100,000 entries (symbols,
relocations) are kept as bytes for numpy. Section headers may be missing: all
that only they can tell is then empty.

Addresses are as in the file: a module's load bias is added by the caller.
"""

from __future__ import annotations

import io
from dataclasses import dataclass
from typing import IO, BinaryIO

from elftools.common.exceptions import ELFError
from elftools.common.utils import struct_parse
from elftools.construct.lib.container import Container
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import StringTableSection

from optpoline.errors import UnsupportedTarget

__all__ = ["ElfFacts", "RawSymbols", "Segment", "read_at", "read_elf", "read_elf_headers"]

_PF_X = 1
_SHF_EXECINSTR = 4
_PLT_PREFIX = ".plt"

_USER_SPACE_END = 1 << 56
"""No program is above, with five-level page tables either."""

_E_SHOFF = slice(0x28, 0x30)
_E_SHNUM = slice(0x3C, 0x40)
"""Fields of the ELF header: where section headers are, their number and that of their names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Segment:
    """One PT_LOAD.

    Attributes:
        addr: First address.
        file_size: Bytes that come from the file.
        memory_size: Bytes in memory; those behind file_size begin as zeros.
        file_off: Where its bytes are in the file.
        is_executable: Whether instructions can be fetched from it.
    """

    addr: int
    file_size: int
    memory_size: int
    file_off: int
    is_executable: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class RawSymbols:
    """A symbol table as it is in the file.

    Attributes:
        entries: Elf64_Sym[], 24 bytes each.
        names: The string table it refers to.
    """

    entries: bytes
    names: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class ElfFacts:
    """What the headers of one ELF file say.

    Attributes:
        is_position_independent: Whether it is ET_DYN.
        has_interpreter: Whether it is a program that a dynamic linker starts.
        entry: Where it begins to run, 0 if nowhere.
        segments: Its PT_LOADs.
        dynamic: Address and size of PT_DYNAMIC, or None.
        note_segments: Address and size of each PT_NOTE.
        eh_frame_hdr: Address and size of PT_GNU_EH_FRAME, or None.
        eh_frame: Address and size of the .eh_frame section, or None.
        text_sections: (start, end) of each executable section.
        plt_sections: (start, end) of those that hold PLT entries.
        symbols: Its .symtab, or None if stripped.
        dynamic_symbols: Its .dynsym, or None.
        build_id: Hex GNU build id, or None.
    """

    is_position_independent: bool
    has_interpreter: bool
    entry: int
    segments: tuple[Segment, ...]
    dynamic: tuple[int, int] | None
    note_segments: tuple[tuple[int, int], ...]
    eh_frame_hdr: tuple[int, int] | None
    eh_frame: tuple[int, int] | None
    text_sections: tuple[tuple[int, int], ...]
    plt_sections: tuple[tuple[int, int], ...]
    symbols: RawSymbols | None
    dynamic_symbols: RawSymbols | None
    build_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Section:
    """One section header."""

    name: str
    addr: int
    size: int
    file_off: int
    link: int
    is_executable: bool
    is_in_file: bool


def read_elf(stream: BinaryIO, path: str) -> ElfFacts:
    """Read the facts of an ELF file.

    Args:
        stream: The file, seekable; it may be closed afterwards.
        path: What to call it in errors.

    Raises:
        UnsupportedTarget: if it is no x86-64 executable or shared library, or broken.
    """
    try:
        return _facts(ELFFile(stream), path)
    except (ELFError, ValueError, KeyError, UnicodeDecodeError) as error:
        raise UnsupportedTarget(f"{path} is not a readable ELF file ({error})") from error


def read_elf_headers(head: bytes, path: str) -> ElfFacts:
    """Read the facts from the first bytes of a mapped module, without its sections.

    Args:
        head: Memory from the ELF header on, program headers included.
        path: What to call it in errors.

    Raises:
        UnsupportedTarget: as ``read_elf``.
    """
    # Section headers are not mapped: say that there are none.
    header = bytearray(head)
    header[_E_SHOFF] = bytes(8)
    header[_E_SHNUM] = bytes(4)
    return read_elf(io.BytesIO(header), path)


def read_at(stream: IO[bytes], off: int, size: int) -> bytes:
    """Read a part of a file that its headers name, as much as there is of it.

    Headers of a broken file may name any part; none is asked for that is not there.
    """
    file_size = stream.seek(0, io.SEEK_END)
    if off >= file_size:
        return b""
    stream.seek(off)
    return stream.read(min(size, file_size - off))


def _facts(elf: ELFFile, path: str) -> ElfFacts:
    """Collect the facts of an opened file."""
    kind = elf.header["e_type"]
    if elf.elfclass != 64 or elf.header["e_machine"] != "EM_X86_64":
        raise UnsupportedTarget(f"{path} is not an x86-64 ELF file")
    if kind not in ("ET_EXEC", "ET_DYN"):
        raise UnsupportedTarget(
            f"{path} is neither an executable nor a shared library", hint="link it first"
        )
    loads, notes, special = _read_segments(elf)
    sections = _read_sections(elf)
    text = [(s.name, (s.addr, s.addr + s.size)) for s in sections if s.is_executable]
    return ElfFacts(
        is_position_independent=kind == "ET_DYN",
        has_interpreter="PT_INTERP" in special,
        entry=elf.header["e_entry"],
        segments=loads,
        dynamic=special.get("PT_DYNAMIC"),
        note_segments=notes,
        eh_frame_hdr=special.get("PT_GNU_EH_FRAME"),
        eh_frame=next(((s.addr, s.size) for s in sections if s.name == ".eh_frame"), None),
        text_sections=tuple(span for _, span in text),
        plt_sections=tuple(span for name, span in text if name.startswith(_PLT_PREFIX)),
        symbols=_read_symbols(elf, sections, ".symtab"),
        dynamic_symbols=_read_symbols(elf, sections, ".dynsym"),
        build_id=_read_build_id(elf, sections),
    )


def _read_segments(
    elf: ELFFile,
) -> tuple[tuple[Segment, ...], tuple[tuple[int, int], ...], dict[str, tuple[int, int]]]:
    """Read the PT_LOADs, where the PT_NOTEs are, and where the other segments are, by type."""
    loads: list[Segment] = []
    notes: list[tuple[int, int]] = []
    special: dict[str, tuple[int, int]] = {}
    # Not by elf.iter_segments(), which decodes every entry of hash tables on the way.
    for index in range(elf.num_segments()):
        pos = elf["e_phoff"] + index * elf["e_phentsize"]
        header = struct_parse(elf.structs.Elf_Phdr, elf.stream, stream_pos=pos)
        if header["p_type"] == "PT_NOTE":
            notes.append((header["p_vaddr"], header["p_memsz"]))
            continue
        if header["p_type"] != "PT_LOAD":
            special[header["p_type"]] = (header["p_vaddr"], header["p_memsz"])
            continue
        if header["p_vaddr"] + header["p_memsz"] > _USER_SPACE_END:
            raise ValueError(f"a segment at {header['p_vaddr']:#x}")
        loads.append(
            Segment(
                addr=header["p_vaddr"],
                file_size=header["p_filesz"],
                memory_size=header["p_memsz"],
                file_off=header["p_offset"],
                is_executable=bool(header["p_flags"] & _PF_X),
            )
        )
    return tuple(loads), tuple(notes), special


def _read_sections(elf: ELFFile) -> list[_Section]:
    """Read the section headers, as directly as the program headers."""
    n_sections = elf.num_sections()
    if n_sections == 0:
        return []
    names = StringTableSection(_read_header(elf, elf.get_shstrndx()), ".shstrtab", elf)
    found: list[_Section] = []
    for index in range(n_sections):
        header = _read_header(elf, index)
        found.append(
            _Section(
                name=names.get_string(header["sh_name"]),
                addr=header["sh_addr"],
                size=header["sh_size"],
                file_off=header["sh_offset"],
                link=header["sh_link"],
                is_executable=bool(header["sh_flags"] & _SHF_EXECINSTR),
                is_in_file=header["sh_type"] != "SHT_NOBITS",
            )
        )
    return found


def _read_header(elf: ELFFile, index: int) -> Container:
    """Read one section header."""
    pos = elf["e_shoff"] + index * elf["e_shentsize"]
    header: Container = struct_parse(elf.structs.Elf_Shdr, elf.stream, stream_pos=pos)
    return header


def _section_data(elf: ELFFile, section: _Section) -> bytes:
    """Read the bytes of a section."""
    return read_at(elf.stream, section.file_off, section.size)


def _read_symbols(elf: ELFFile, sections: list[_Section], name: str) -> RawSymbols | None:
    """Read a symbol table, or None if there is none (or only its header is left)."""
    table = next((s for s in sections if s.name == name and s.is_in_file), None)
    if table is None or table.link >= len(sections):
        return None
    return RawSymbols(
        entries=_section_data(elf, table), names=_section_data(elf, sections[table.link])
    )


def _read_build_id(elf: ELFFile, sections: list[_Section]) -> str | None:
    """Read the GNU build id, or None."""
    note = next((s for s in sections if s.name == ".note.gnu.build-id"), None)
    # Elf64_Nhdr and "GNU\0" come before the id.
    return _section_data(elf, note)[16:].hex() if note else None
