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
from typing import BinaryIO

from elftools.common.exceptions import ELFError
from elftools.elf.elffile import ELFFile

from optpoline.errors import UnsupportedTarget

__all__ = ["ElfFacts", "RawSymbols", "Segment", "read_elf", "read_elf_headers"]

_PF_X = 1
_SHF_EXECINSTR = 4
_SYMBOL_SECTIONS = (".symtab", ".dynsym")
_PLT_PREFIX = ".plt"

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
        eh_frame_hdr: Address and size of PT_GNU_EH_FRAME, or None.
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
    eh_frame_hdr: tuple[int, int] | None
    text_sections: tuple[tuple[int, int], ...]
    plt_sections: tuple[tuple[int, int], ...]
    symbols: RawSymbols | None
    dynamic_symbols: RawSymbols | None
    build_id: str | None


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


def _facts(elf: ELFFile, path: str) -> ElfFacts:
    """Collect the facts of an opened file."""
    kind = elf.header["e_type"]
    if elf.elfclass != 64 or elf.header["e_machine"] != "EM_X86_64":
        raise UnsupportedTarget(f"{path} is not an x86-64 ELF file")
    if kind not in ("ET_EXEC", "ET_DYN"):
        raise UnsupportedTarget(
            f"{path} is neither an executable nor a shared library", hint="link it first"
        )
    loads: list[Segment] = []
    special: dict[str, tuple[int, int]] = {}
    for segment in elf.iter_segments():
        header = segment.header
        if header["p_type"] == "PT_LOAD":
            loads.append(
                Segment(
                    addr=header["p_vaddr"],
                    file_size=header["p_filesz"],
                    memory_size=header["p_memsz"],
                    file_off=header["p_offset"],
                    is_executable=bool(header["p_flags"] & _PF_X),
                )
            )
        else:
            special[header["p_type"]] = (header["p_vaddr"], header["p_memsz"])
    text: list[tuple[int, int]] = []
    plt: list[tuple[int, int]] = []
    tables: dict[str, RawSymbols] = {}
    build_id: str | None = None
    for section in elf.iter_sections():
        header = section.header
        if header["sh_flags"] & _SHF_EXECINSTR:
            span = (header["sh_addr"], header["sh_addr"] + header["sh_size"])
            text.append(span)
            if section.name.startswith(_PLT_PREFIX):
                plt.append(span)
        elif section.name in _SYMBOL_SECTIONS and header["sh_type"] != "SHT_NOBITS":
            names = elf.get_section(header["sh_link"])
            tables[section.name] = RawSymbols(entries=section.data(), names=names.data())
        elif section.name == ".note.gnu.build-id":
            # Elf64_Nhdr and "GNU\0" come before the id.
            build_id = section.data()[16:].hex()
    return ElfFacts(
        is_position_independent=kind == "ET_DYN",
        has_interpreter="PT_INTERP" in special,
        entry=elf.header["e_entry"],
        segments=tuple(loads),
        dynamic=special.get("PT_DYNAMIC"),
        eh_frame_hdr=special.get("PT_GNU_EH_FRAME"),
        text_sections=tuple(text),
        plt_sections=tuple(plt),
        symbols=tables.get(".symtab"),
        dynamic_symbols=tables.get(".dynsym"),
        build_id=build_id,
    )
