# SPDX-License-Identifier: Apache-2.0
"""Modules in made-up memory, and in our own process."""

from __future__ import annotations

import os
import struct
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import NoteSection

from optpoline.errors import TargetFault
from optpoline.model import Addr, Mapping, Module
from optpoline.process.modules import find_modules, list_modules, open_module

BUILD_ID = bytes(range(20))
NOTE_OFF = 0x300


class FakeMemory:
    """Memory made of pieces."""

    def __init__(self, **pieces: bytes) -> None:
        """Take pieces named by their address, as x1000=b"..."."""
        self._pieces = {int(name[1:], 16): data for name, data in pieces.items()}

    def read(self, addr: int, size: int) -> bytes:
        """Return bytes of one piece."""
        for start, data in self._pieces.items():
            if start <= addr and addr + size <= start + len(data):
                return data[addr - start : addr - start + size]
        raise TargetFault(addr, size, "read")


def _elf(*, vaddr: int = 0, machine: int = 62) -> bytes:
    """Return the first page of a file with text at offset 0x1000."""
    segments = [
        (1, 4, 0, vaddr, vaddr, 0x800, 0x800, 4096),
        # Text whose file offset is not at a page: the linker maps the whole page.
        (1, 5, 0x1040, vaddr + 0x1040, 0, 0x1F00, 0x1F00, 4096),
        (1, 6, 0x3000, vaddr + 0x4000, 0, 0x100, 0x900, 4096),
        (4, 4, NOTE_OFF, vaddr + NOTE_OFF, 0, 36, 36, 4),
    ]
    header = struct.pack(
        "<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 3, machine, 1, 0, 64, 0, 0, 64, 56,
        len(segments), 64, 0, 0,
    )  # fmt: skip
    data = header + b"".join(struct.pack("<IIQQQQQQ", *segment) for segment in segments)
    data = data.ljust(NOTE_OFF, b"\0")
    data += struct.pack("<III4s", 4, len(BUILD_ID), 3, b"GNU\0") + BUILD_ID
    return data.ljust(4096, b"\0")


def _map(start: int, size: int, perms: str, offset: int, path: str = "/lib/a.so") -> Mapping:
    return Mapping(
        start=Addr(start), end=Addr(start + size), perms=perms, offset=offset,
        device="fd:01", inode=7, path=path,
    )  # fmt: skip


def _image(base: int, path: str = "/lib/a.so") -> tuple[Mapping, ...]:
    return (
        _map(base, 0x1000, "r--p", 0, path),
        _map(base + 0x1000, 0x2000, "r-xp", 0x1000, path),
        _map(base + 0x4000, 0x1000, "rw-p", 0x3000, path),
    )


def test_position_independent() -> None:
    maps = _image(0x70000)
    (module,) = find_modules(maps, FakeMemory(x70000=_elf()), table_addr=0x70040)
    assert (module.load_bias, module.start, module.end) == (0x70000, 0x70000, 0x75000)
    assert module.build_id == BUILD_ID.hex()
    assert module.is_main
    assert module.mappings == maps


def test_fixed_address() -> None:
    maps = _image(0x400000)
    (module,) = find_modules(maps, FakeMemory(x400000=_elf(vaddr=0x400000)))
    assert module.load_bias == 0
    assert not module.is_main


def test_deleted_and_split_text() -> None:
    head, text, data = _image(0x70000, "/lib/a.so (deleted)")
    first = replace(text, end=Addr(text.start + 0x1000))
    second = replace(text, start=first.end, offset=0x2000)
    maps = (head, first, second, data)
    (module,) = find_modules(maps, FakeMemory(x70000=_elf()))
    assert module.path == "/lib/a.so"
    assert module.mappings == maps


def test_loaded_twice() -> None:
    maps = _image(0x70000) + _image(0x90000)
    memory = FakeMemory(x70000=_elf(), x90000=_elf())
    assert [m.load_bias for m in find_modules(maps, memory)] == [0x70000, 0x90000]


def _copy(start: int, size: int, perms: str = "r-xp", inode: int = 0, path: str = "") -> Mapping:
    return replace(_map(start, size, perms, 0, path), inode=inode)


@pytest.mark.parametrize(
    ("inode", "path"), [(0, ""), (0, "[anon:text]"), (9, "/anon_hugepage (deleted)")]
)
@pytest.mark.parametrize("n_replaced", [1, 2])
def test_text_copied_to_anonymous_memory(inode: int, path: str, n_replaced: int) -> None:
    head, text, data = _image(0x70000)
    copy = _copy(text.start, n_replaced * 0x1000, inode=inode, path=path)
    rest = (replace(text, start=copy.end, offset=0x2000),) if copy.end < text.end else ()
    maps = (head, copy, *rest, data)
    (module,) = find_modules(maps, FakeMemory(x70000=_elf()), table_addr=0x70040)
    assert module.mappings == maps
    assert (module.load_bias, module.is_main) == (0x70000, True)


def test_anonymous_code_elsewhere_is_not_the_modules() -> None:
    """In the gap between text and data, where the file has no code; or not executable."""
    head, text, data = _image(0x70000)
    gap = _copy(text.end, 0x1000)
    (module,) = find_modules((head, text, gap, data), FakeMemory(x70000=_elf()))
    assert module.mappings == (head, text, data)
    hole = _copy(text.start, text.size, "rw-p")
    assert find_modules((head, hole, data), FakeMemory(x70000=_elf())) == ()


@pytest.mark.parametrize("head", [_elf(machine=183), bytes(4096), b"\x7fELF\x01\x01" + bytes(4090)])
def test_not_a_module(head: bytes) -> None:
    assert find_modules(_image(0x70000), FakeMemory(x70000=head)) == ()


def test_unreadable() -> None:
    assert find_modules(_image(0x70000), FakeMemory()) == ()


def test_own_modules() -> None:
    modules = list_modules(os.getpid())
    (main,) = [module for module in modules if module.is_main]
    assert Path(main.path).samefile(sys.executable)
    assert not any(module.path.startswith("[") for module in modules)
    libc = next(module for module in modules if module.name.startswith("libc.so"))
    with open(libc.path, "rb") as file:
        elf = ELFFile(file)
        note = next(
            note
            for section in elf.iter_sections()
            if isinstance(section, NoteSection) and section.name == ".note.gnu.build-id"
            for note in section.iter_notes()
        )
        assert note["n_desc"] == libc.build_id
        text = next(s for s in elf.iter_segments("PT_LOAD") if s["p_flags"] & 1)
        mapping = next(m for m in libc.mappings if m.is_executable)
        assert libc.load_bias + text["p_vaddr"] & -4096 == mapping.start


def test_open_the_same_file(tmp_path: Path) -> None:
    path = tmp_path / "a.so"
    path.write_bytes(b"old")
    stat = path.stat()
    mapping = replace(
        _map(0x1000, 0x1000, "r-xp", 0, str(path)),
        inode=stat.st_ino,
        device=f"{os.major(stat.st_dev):02x}:{os.minor(stat.st_dev):02x}",
    )
    module = Module(
        path=str(path), load_bias=0, start=mapping.start, end=mapping.end,
        mappings=(mapping,), is_main=False, build_id=None,
    )  # fmt: skip
    root = tmp_path / "proc"
    (root / "5").mkdir(parents=True)
    (root / "5" / "root").symlink_to("/")
    file = open_module(5, module, proc_root=root)
    assert file is not None
    with file:
        assert file.read() == b"old"
    # An upgrade puts another file in its place.
    (tmp_path / "new").write_bytes(b"new")
    (tmp_path / "new").rename(path)
    assert open_module(5, module, proc_root=root) is None
