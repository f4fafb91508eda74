# SPDX-License-Identifier: Apache-2.0
"""Find the ELF files that are mapped into a target.

Headers are read from the target's *memory*, where the dynamic linker has put
them: no file is opened to list modules, so a deleted or replaced file makes no
difference. Only program headers and notes are looked at.

Some programs copy their text to anonymous memory on huge pages and put that in its
place. Such memory is taken for the file's if it lies where the headers, which stay
the file's, say that text is.
"""

from __future__ import annotations

import os
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO, NamedTuple

from optpoline.errors import TargetFault
from optpoline.model import Mapping, Module
from optpoline.process.leader import find_live_tid
from optpoline.process.memory import Memory, RemoteMemory
from optpoline.process.procfs import read_maps

__all__ = ["find_modules", "is_anonymous", "list_modules", "open_module"]

_DELETED = " (deleted)"
_HUGE_PAGES = "/anon_hugepage"  # anonymous memory of hugetlbfs has an inode
_PAGE_MASK = 4095
# System V gABI, ELF-64: the file header, a program header.
_FILE_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_PROGRAM_HEADER = struct.Struct("<IIQQQQQQ")
_MAGIC_64_LITTLE = b"\x7fELF\x02\x01"
_EM_X86_64 = 62
_PT_LOAD, _PT_NOTE = 1, 4
_PF_X = 1
_NT_GNU_BUILD_ID = 3
_AT_PHDR = 3
_MAX_PROGRAM_HEADERS = 256
_MAX_NOTE_SIZE = 1 << 16
_FIRST_READ_SIZE = 1024  # the file header and fourteen program headers


class _Segment(NamedTuple):
    """One program header."""

    kind: int
    flags: int
    off: int
    vaddr: int
    paddr: int
    file_size: int
    mem_size: int
    align: int


@dataclass(frozen=True, slots=True, kw_only=True)
class _Headers:
    """What the head of an ELF file says."""

    segments: tuple[_Segment, ...]
    table_off: int

    def find_bias(self, mapping: Mapping) -> int | None:
        """Return the load bias by which an executable mapping is where it is."""
        for segment in self.segments:
            begin = segment.off & ~_PAGE_MASK
            if (
                segment.kind == _PT_LOAD
                and segment.flags & _PF_X
                and begin <= mapping.offset < segment.off + segment.file_size
            ):
                return (mapping.start - mapping.offset) - (segment.vaddr - segment.off)
        return None

    def find_bias_of_head(self, addr: int) -> int | None:
        """Return the load bias by which the beginning of the file is at an address."""
        for segment in self.segments:
            if segment.kind == _PT_LOAD and segment.off == 0:
                return addr - (segment.vaddr & ~_PAGE_MASK)
        return None

    def is_text(self, vaddr: int) -> bool:
        """Say whether an ELF address is in a page of executable code."""
        return any(
            segment.kind == _PT_LOAD
            and segment.flags & _PF_X
            and segment.vaddr & ~_PAGE_MASK <= vaddr < segment.vaddr + segment.mem_size
            for segment in self.segments
        )

    def find_extent(self) -> tuple[int, int]:
        """Return the lowest and highest ELF address that is loaded, in whole pages."""
        loads = [s for s in self.segments if s.kind == _PT_LOAD]
        end = max(s.vaddr + s.mem_size for s in loads)
        return min(s.vaddr for s in loads) & ~_PAGE_MASK, (end + _PAGE_MASK) & ~_PAGE_MASK

    def find_table_addr(self) -> int | None:
        """Return the ELF address of the program header table, if it is loaded."""
        for segment in self.segments:
            if segment.kind == _PT_LOAD and 0 <= self.table_off - segment.off < segment.file_size:
                return segment.vaddr + self.table_off - segment.off
        return None


def list_modules(pid: int, *, memory: Memory | None = None) -> tuple[Module, ...]:
    """Return every mapped x86-64 ELF file that has executable code, by address.

    The vDSO is not one: it is no file.

    Args:
        pid: The target.
        memory: Its memory, where it is open already.

    Raises:
        ProcessGone: if it does not exist.
        PermissionDenied: if we may not read its memory.
    """
    mappings = read_maps(pid)
    table_addr = _read_aux_value(pid, _AT_PHDR)
    if memory is not None:
        return find_modules(mappings, memory, table_addr=table_addr)
    with RemoteMemory(pid) as remote:
        return find_modules(mappings, remote, table_addr=table_addr)


def find_modules(
    mappings: tuple[Mapping, ...], memory: Memory, *, table_addr: int = 0
) -> tuple[Module, ...]:
    """Return the modules in a memory map; for those who have just read the map.

    Args:
        mappings: The whole map.
        memory: The target's memory.
        table_addr: Where the executable's program headers are (AT_PHDR), 0 if unknown.
    """
    files: dict[tuple[str, int, str], list[Mapping]] = {}
    copies = [m for m in mappings if m.is_executable and is_anonymous(m)]
    for mapping in mappings:
        if mapping.inode:
            key = (mapping.device, mapping.inode, mapping.path)
            files.setdefault(key, []).append(mapping)
    modules = []
    for group in files.values():
        own = [m for m in copies if group[0].start < m.start < group[-1].end]
        if own or any(mapping.is_executable for mapping in group):
            modules += _find_images(group, own, memory, table_addr)
    return tuple(sorted(modules, key=lambda module: module.start))


def is_anonymous(mapping: Mapping) -> bool:
    """Say whether a mapping shows no file, such as a program's copy of its own text."""
    return mapping.inode == 0 or mapping.path.startswith(_HUGE_PAGES)


def open_module(pid: int, module: Module, *, proc_root: Path = Path("/proc")) -> BinaryIO | None:
    """Open the very file that is mapped, or return None if it cannot be had.

    ``map_files`` leads to it even when it is deleted, but needs a capability;
    else its path is followed in the target's root directory, and the file taken
    only if it is still the same one (device and inode).
    """
    first = module.mappings[0]
    directory = f"{proc_root}/{find_live_tid(pid, proc_root=proc_root)}"
    for path in (
        f"{directory}/map_files/{first.start:x}-{first.end:x}",
        f"{directory}/root{module.path}",
    ):
        try:
            fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            continue
        file = os.fdopen(fd, "rb")
        if "/map_files/" in path or _is_same_file(file, first):
            return file
        file.close()
    return None


def _is_same_file(file: BinaryIO, mapping: Mapping) -> bool:
    """Say whether a file is the one a mapping shows."""
    stat = os.fstat(file.fileno())
    device = f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}"
    return stat.st_ino == mapping.inode and device == mapping.device


def _find_images(
    group: list[Mapping], copies: list[Mapping], memory: Memory, table_addr: int
) -> list[Module]:
    """Return the images in the mappings of one file; dlmopen can load it twice.

    Args:
        group: What is mapped of the file.
        copies: Anonymous executable memory between those.
        memory: The target's memory.
        table_addr: Where the executable's program headers are.
    """
    images: dict[int, _Headers] = {}
    for mapping in group:
        if not mapping.is_executable:
            continue
        headers = _read_headers_before(group, mapping, memory)
        bias = headers.find_bias(mapping) if headers else None
        if headers is not None and bias is not None:
            images.setdefault(bias, headers)
    copies = [m for m in copies if _add_copied(group, m, memory, images)]
    modules = []
    for bias, headers in images.items():
        low, high = headers.find_extent()
        parts = tuple(
            sorted(
                (m for m in (*group, *copies) if bias + low <= m.start < bias + high),
                key=lambda m: m.start,
            )
        )
        table_vaddr = headers.find_table_addr()
        modules.append(
            Module(
                path=group[0].path.removesuffix(_DELETED),
                load_bias=bias,
                start=parts[0].start,
                end=parts[-1].end,
                mappings=parts,
                is_main=table_vaddr is not None and table_addr == bias + table_vaddr,
                build_id=_read_build_id(headers, bias, memory),
            )
        )
    return modules


def _add_copied(
    group: list[Mapping], copy: Mapping, memory: Memory, images: dict[int, _Headers]
) -> bool:
    """Add the image whose text an anonymous mapping replaces; say if there is one."""
    for head in group:
        if head.offset or head.start > copy.start:
            continue
        headers = _read_headers(head.start, memory)
        bias = headers.find_bias_of_head(head.start) if headers else None
        if headers is not None and bias is not None and headers.is_text(copy.start - bias):
            images.setdefault(bias, headers)
            return True
    return False


def _read_headers_before(group: list[Mapping], mapping: Mapping, memory: Memory) -> _Headers | None:
    """Read the ELF headers of the image a mapping belongs to: the nearest below it."""
    heads = [m for m in group if m.offset == 0]
    heads.sort(key=lambda m: (m.start > mapping.start, abs(mapping.start - m.start)))
    for head in heads:
        headers = _read_headers(head.start, memory)
        if headers is not None:
            return headers
    return None


def _read_headers(addr: int, memory: Memory) -> _Headers | None:
    """Read the ELF headers at an address; None if there are none of our kind."""
    try:
        data = memory.read(addr, _FIRST_READ_SIZE)
        fields = _FILE_HEADER.unpack_from(data)
        ident, machine, table_off, entry_size, n_entries = (
            fields[0], fields[2], fields[5], fields[9], fields[10],
        )  # fmt: skip
        if not ident.startswith(_MAGIC_64_LITTLE) or machine != _EM_X86_64:
            return None
        if entry_size != _PROGRAM_HEADER.size or n_entries > _MAX_PROGRAM_HEADERS:
            return None
        end = table_off + n_entries * entry_size
        if end > len(data):
            data = memory.read(addr + table_off, end - table_off)
        else:
            data = data[table_off:end]
    except TargetFault:
        return None
    segments = tuple(map(_Segment._make, _PROGRAM_HEADER.iter_unpack(data)))
    if not any(segment.kind == _PT_LOAD for segment in segments):
        return None
    return _Headers(segments=segments, table_off=table_off)


def _read_build_id(headers: _Headers, bias: int, memory: Memory) -> str | None:
    """Return the GNU build id from the notes, in hex."""
    for segment in headers.segments:
        if segment.kind != _PT_NOTE or segment.file_size > _MAX_NOTE_SIZE:
            continue
        try:
            notes = memory.read(bias + segment.vaddr, segment.file_size)
        except TargetFault:
            continue
        align = 8 if segment.align == 8 else 4
        off = 0
        while off + 12 <= len(notes):
            name_size, size, kind = struct.unpack_from("<III", notes, off)
            name_off = off + 12
            data_off = off + (12 + name_size + align - 1 & -align)
            if kind == _NT_GNU_BUILD_ID and notes[name_off : name_off + name_size] == b"GNU\0":
                return notes[data_off : data_off + size].hex()
            off = data_off + (size + align - 1 & -align)
    return None


def _read_aux_value(pid: int, kind: int) -> int:
    """Return a value of the auxiliary vector, 0 where it cannot be had."""
    try:
        data = Path(f"/proc/{find_live_tid(pid)}/auxv").read_bytes()
    except OSError:
        return 0
    for key, value in struct.iter_unpack("<QQ", data[: len(data) & -16]):
        if key == kind:
            return int(value)
    return 0
