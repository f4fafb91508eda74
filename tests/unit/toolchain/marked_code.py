# SPDX-License-Identifier: Apache-2.0
"""What the plugin wrote, read from a linked file by other means than ours: capstone, pyelftools."""

from __future__ import annotations

import struct
from dataclasses import dataclass
from pathlib import Path

from capstone import CS_ARCH_X86, CS_MODE_64, Cs, CsInsn
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

__all__ = ["COLD", "EXCLUDED", "GOTO", "Code", "Note", "read_code"]

EXCLUDED, COLD, GOTO = 16, 32, 64
_INDIRECT_SITE = 8

_NOTE = struct.Struct("<III12s4B6iII")
_HEAD_SIZE = 24
"""Of an ELF note: three sizes, and the owner's name up to a multiple of four."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One note; strings are "" where it has none."""

    site: int
    flags: int
    length: int
    type: str
    file: str
    line: int
    n_branches: int
    register: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Code:
    """One file.

    Attributes:
        notes: By the address of their site.
        branches: Indirect branches of named functions, thunks among them, by address.
        functions: The function of each branch.
        insns: Mnemonics and operands of each function, without prefixes and addresses.
    """

    notes: dict[int, Note]
    branches: dict[int, CsInsn]
    functions: dict[int, str]
    insns: dict[str, list[str]]

    def noted_in(self, function: str) -> list[Note]:
        """Return the notes of a function, in address order."""
        addrs = sorted(addr for addr in self.notes if self.functions.get(addr) == function)
        return [self.notes[addr] for addr in addrs]


class _Image:
    """The loaded bytes of a file."""

    def __init__(self, elf: ELFFile) -> None:
        """Read all segments."""
        segments = [one for one in elf.iter_segments() if one["p_type"] == "PT_LOAD"]
        self.parts = [(int(one["p_vaddr"]), bytes(one.data())) for one in segments]

    def read(self, addr: int, size: int) -> bytes:
        """Return the bytes at an address."""
        for start, data in self.parts:
            if start <= addr < start + len(data):
                return data[addr - start : addr - start + size]
        raise AssertionError(f"nothing at {addr:#x}")

    def string_at(self, field_addr: int, off: int) -> str:
        """Return the string that a field refers to."""
        return self.read(field_addr + off, 1000).partition(b"\0")[0].decode() if off else ""


def read_code(path: Path, *, runtime: frozenset[str]) -> Code:
    """Read a file.

    Args:
        path: A linked file with symbols.
        runtime: Functions that are the compiler's own, to leave out.
    """
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        image = _Image(elf)
        notes = _read_notes(elf, image)
        symbols = [
            symbol
            for section in elf.iter_sections()
            if isinstance(section, SymbolTableSection) and section.name == ".symtab"
            for symbol in section.iter_symbols()
        ]
    thunks = {one["st_value"] for one in symbols if one.name.startswith("__x86_indirect_thunk")}
    decoder = Cs(CS_ARCH_X86, CS_MODE_64)
    branches: dict[int, CsInsn] = {}
    functions: dict[int, str] = {}
    insns: dict[str, list[str]] = {}
    for symbol in symbols:
        is_code = symbol["st_info"]["type"] == "STT_FUNC" and symbol["st_shndx"] != "SHN_UNDEF"
        if not is_code or symbol.name in runtime or symbol["st_value"] in thunks:
            continue
        listed = insns.setdefault(symbol.name.partition(".")[0], [])
        code = image.read(symbol["st_value"], symbol["st_size"])
        for insn in decoder.disasm(code, symbol["st_value"]):
            name = insn.mnemonic.split()[-1]
            if name == "nop":
                continue  # alignment
            is_direct = insn.op_str.startswith("0x")
            operands = "" if "rip" in insn.op_str or is_direct else insn.op_str.replace("cs:", "")
            listed.append(f"{name} {operands}")
            is_thunk = is_direct and int(insn.op_str, 16) in thunks
            if name in ("call", "jmp") and (is_thunk or not is_direct):
                branches[insn.address] = insn
                functions[insn.address] = symbol.name.partition(".")[0]
    return Code(notes=notes, branches=branches, functions=functions, insns=insns)


def _read_notes(elf: ELFFile, image: _Image) -> dict[int, Note]:
    """Return the notes of a file; there is one for each site."""
    section = elf.get_section_by_name("optpoline_notes")
    if section is None:
        return {}
    notes: dict[int, Note] = {}
    data, start = section.data(), section["sh_addr"]
    assert len(data) % _NOTE.size == 0
    for off in range(0, len(data), _NOTE.size):
        fields = _NOTE.unpack_from(data, off)
        owner_size, size, number, owner, version, kind, flags, length = fields[:8]
        assert (owner_size, size, number) == (10, _NOTE.size - _HEAD_SIZE, 0x706F)
        assert owner == b"optpoline\0\0\0"
        assert (version, kind) == (1, _INDIRECT_SITE)
        body = start + off + _HEAD_SIZE
        site, linked, target, name, type_off, file_off, line, n_branches = fields[8:]
        assert (target, name) == (0, 0)
        note = Note(
            site=body + 4 + site,
            flags=flags,
            length=length,
            type=image.string_at(body + 20, type_off),
            file=image.string_at(body + 24, file_off),
            line=line,
            n_branches=n_branches,
            register=image.string_at(body + 8, linked),
        )
        assert note.site not in notes
        notes[note.site] = note
    return notes
