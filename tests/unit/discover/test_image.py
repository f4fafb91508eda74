# SPDX-License-Identifier: Apache-2.0
"""Modules as a process sees them: biased, with breakpoints, or without their file."""

from __future__ import annotations

import io
import random
from collections.abc import Callable
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile

from optpoline.discover import ModuleImage, find_sites
from optpoline.errors import OptpolineError, TargetFault, UnsupportedTarget
from optpoline.model import Addr, Mapping, Module, Refusal

Build = Callable[..., Path]
Strip = Callable[[Path], Path]

BIAS = 0x5555_5555_4000
PAGE_SIZE = 4096


class LoadedFile:
    """The segments of an ELF file as a process has them, whole pages, not yet relocated."""

    def __init__(self, path: Path, bias: int = BIAS) -> None:
        """Map the file at a bias."""
        self.pages: dict[int, bytearray] = {}
        self.mappings: list[Mapping] = []
        self.path, self.bias = path, bias
        data = path.read_bytes()
        for segment in ELFFile(io.BytesIO(data)).iter_segments("PT_LOAD"):
            start = segment["p_vaddr"] // PAGE_SIZE * PAGE_SIZE
            end = -(-(segment["p_vaddr"] + segment["p_memsz"]) // PAGE_SIZE) * PAGE_SIZE
            area = bytearray(end - start)
            off = segment["p_vaddr"] - start
            area[off : off + segment["p_filesz"]] = segment.data()
            if segment["p_offset"] == 0:
                area[: len(data[:PAGE_SIZE])] = data[:PAGE_SIZE]
            self.pages[start + bias] = area
            self.mappings.append(
                Mapping(
                    start=Addr(start + bias),
                    end=Addr(end + bias),
                    perms="r-xp" if segment["p_flags"] & 1 else "r--p",
                    offset=segment["p_offset"] // PAGE_SIZE * PAGE_SIZE,
                    device="00:01",
                    inode=1,
                    path=str(path),
                )
            )

    def read(self, addr: int, size: int) -> bytes:
        """Read from one segment's pages."""
        for start, area in self.pages.items():
            if start <= addr and addr + size <= start + len(area):
                return bytes(area[addr - start : addr - start + size])
        raise TargetFault(addr, size, "read")

    def write(self, addr: int, data: bytes) -> None:
        """Write into one segment's pages."""
        for start, area in self.pages.items():
            if start <= addr < start + len(area):
                area[addr - start : addr - start + len(data)] = data

    def image(self, *, with_file: bool = True) -> ModuleImage:
        """Describe it as a module of a process."""
        module = Module(
            path=str(self.path),
            load_bias=self.bias,
            start=self.mappings[0].start,
            end=self.mappings[-1].end,
            mappings=tuple(self.mappings),
            is_main=True,
            build_id=None,
        )
        if not with_file:
            return ModuleImage.from_process(module, self, None)
        with self.path.open("rb") as stream:
            return ModuleImage.from_process(module, self, stream)


@pytest.fixture
def program(build: Build) -> Path:
    """Give a position-independent program with sites."""
    return build("sites_basic.c", "-O2", "-mindirect-branch=thunk")


def test_addresses_are_biased(program: Path) -> None:
    from_file = find_sites(ModuleImage.from_file(str(program)))
    image = LoadedFile(program).image()
    loaded = find_sites(image)
    assert [site.addr - BIAS for site in loaded.sites] == [site.addr for site in from_file.sites]
    assert [site.function for site in loaded.sites] == [site.function for site in from_file.sites]
    assert all(site.refusal is None for site in loaded.sites)
    first = loaded.sites[0]
    assert first.function_addr is not None
    assert image.symbols.name_at(first.addr) == (first.function, first.addr - first.function_addr)
    assert image.is_code(first.addr)
    assert not image.is_code(first.addr - BIAS)
    assert image.symbols.name_at(0x10) is None


def test_without_its_file(program: Path) -> None:
    with_file = find_sites(LoadedFile(program).image())
    without = find_sites(LoadedFile(program).image(with_file=False))
    assert [(s.addr, s.code, s.thunk.operand, s.refusal) for s in without.sites] == [
        (s.addr, s.code, s.thunk.operand, s.refusal) for s in with_file.sites
    ]
    assert {site.function for site in without.sites} == {None}


def test_breakpoint_in_a_site(program: Path) -> None:
    loaded = LoadedFile(program)
    clean = find_sites(loaded.image())
    victim = clean.sites[1]
    loaded.write(victim.addr, b"\xcc")
    found = find_sites(loaded.image())
    refused = [site for site in found.sites if site.refusal is not None]
    assert [(site.addr, site.refusal) for site in refused] == [(victim.addr, Refusal.FOREIGN_BYTES)]
    assert refused[0].code == b"\xcc" + victim.code[1:]
    assert len(found.sites) == len(clean.sites)


def test_breakpoint_elsewhere_hides_no_site(program: Path) -> None:
    loaded = LoadedFile(program)
    clean = find_sites(loaded.image())
    starts = {site.function_addr for site in clean.sites}
    for start in starts:
        assert start is not None
        loaded.write(start, b"\xcc")
    assert find_sites(loaded.image()).sites == clean.sites


def test_other_patcher_is_left_alone(program: Path) -> None:
    loaded = LoadedFile(program)
    clean = find_sites(loaded.image())
    victim = clean.sites[0]
    loaded.write(victim.disp_addr, b"\x00\x00\x10\x00")
    assert find_sites(loaded.image()).sites == clean.sites[1:]


def test_unreadable_and_foreign_files(tmp_path: Path, build: Build) -> None:
    with pytest.raises(OptpolineError, match="cannot be read"):
        ModuleImage.from_file(str(tmp_path / "missing"))
    for name, content in (("empty", b""), ("text", b"hello"), ("cut", b"\x7fELF\x02\x01\x01")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UnsupportedTarget, match=name):
            ModuleImage.from_file(str(tmp_path / name))
    with pytest.raises(UnsupportedTarget, match="shared library"):
        ModuleImage.from_file(str(build("sites_basic.c", "-c", name="basic.o")))


def test_broken_headers_give_clear_errors(program: Path, tmp_path: Path) -> None:
    rng = random.Random(7)
    content = program.read_bytes()
    broken = tmp_path / "broken"
    n_refused = 0
    for _ in range(150):
        data = bytearray(content)
        for _ in range(rng.choice((1, 3, 10))):
            in_headers = rng.randrange(64 + 56 * 13)
            off = rng.choice((in_headers, rng.randrange(len(data) - 64 * 31, len(data))))
            data[off] = rng.choice((0, 0xFF, rng.randrange(256)))
        broken.write_bytes(data[: rng.choice((len(data), rng.randrange(len(data))))])
        try:
            find_sites(ModuleImage.from_file(str(broken)))
        except OptpolineError:
            n_refused += 1
    assert 0 < n_refused < 150


def test_build_id(build: Build) -> None:
    program = build("sites_basic.c", "-Wl,--build-id=0x0123456789abcdef")
    assert ModuleImage.from_file(str(program)).module.build_id == "0123456789abcdef"
