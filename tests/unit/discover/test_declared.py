# SPDX-License-Identifier: Apache-2.0
"""The notes of optpoline.h say what the source does, in whatever way it was built."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from elftools.elf.elffile import ELFFile
from elftools.elf.relocation import RelocationSection

from optpoline.controller.declared_summaries import summarise_declared
from optpoline.controller.summary import DeclaredKind, DeclaredSummary
from optpoline.discover.declared import read_declarations
from optpoline.discover.image import ModuleImage

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"

C = ("gcc", "-std=c11", "-x", "c")
CXX = ("g++", "-std=c++17", "-x", "c++")
GC = ("-ffunction-sections", "-fdata-sections", "-Wl,--gc-sections")
RETPOLINE = ("-mindirect-branch=thunk", "-fcf-protection=none")

BUILDS: dict[str, tuple[str, ...]] = {
    "c -O0": (*C, "-O0"),
    "c -O1 no-pie": (*C, "-O1", "-fno-pie", "-no-pie"),
    "c -O2": (*C, "-O2", "-fcf-protection=full"),
    "c -O3 static": (*C, "-O3", "-static"),
    "c -Os gc-sections": (*C, "-Os", *GC),
    "c -O2 lto": (*C, "-O2", "-flto"),
    "c -O2 shared": (*C, "-O2", "-fPIC", "-shared"),
    "c -O2 retpoline": (*C, "-O2", *RETPOLINE),
    "c++ -O0 retpoline": (*CXX, "-O0", *RETPOLINE),
    "c++ -O2 gc-sections": (*CXX, "-O2", *GC),
    "c++ -O3 lto": (*CXX, "-O3", "-flto", "-fno-exceptions"),
    "c++ -O1 gold": (*CXX, "-O1", "-fuse-ld=gold"),
    "clang c -O2 shared": ("clang", *C[1:], "-O2", "-fPIC", "-shared"),
    "clang c++ -O1 lld gc-sections": ("clang++", *CXX[1:], "-O1", *GC, "-fuse-ld=lld"),
}

Built = Callable[[str], Path]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Built:
    """Return a function that gives the stripped project as built in one of these ways."""
    directory = tmp_path_factory.mktemp("declared")
    done: dict[str, Path] = {}

    def build(name: str) -> Path:
        if name not in done:
            path = directory / f"project-{len(done)}"
            flags = (*BUILDS[name], "-s", "-pedantic", "-Wall", "-Wextra", f"-I{INCLUDE}")
            sources = (str(PROJECT / "main.c"), str(PROJECT / "other.c"))
            command = [*flags, *sources, "-o", str(path)]
            output = subprocess.run(command, check=True, capture_output=True, text=True)
            warnings = [line for line in output.stderr.splitlines() if "lto-wrapper" not in line]
            assert warnings == []
            done[name] = path
        return done[name]

    return build


each_build = pytest.mark.parametrize("build", BUILDS)
Row = tuple[str, int, str, str, str]


def marked(build: str) -> Iterator[Row]:
    """Read what the source says that it declares: file, line, kind, name, first state."""
    for path in (PROJECT / "main.c", PROJECT / "other.c", PROJECT / "shapes.h"):
        for number, line in enumerate(path.read_text().splitlines(), 1):
            found = re.search(r"/\* @(\w+) (\w+)((?: [\w+]+)*) \*/", line)
            if found is None:
                continue
            words = set(found[3].split())
            is_dropped = "unused" in words and ("gc-sections" in build or "lto" in build)
            if is_dropped or ("C++" in words and "c++" not in build):
                continue
            state = next(iter(words & {"on", "off", "nop", "jump"}), "")
            # Clang says where a macro's arguments end, GCC where its name is.
            later = 2 if "clang" in build and "clang+2" in words else 0
            yield path.name, number + later, found[1], found[2], state


def row_of(one: DeclaredSummary) -> Row:
    """Say the same of a declaration that was read."""
    assert one.file is not None
    assert one.line is not None
    assert one.name is not None
    states = {DeclaredKind.KEY: ("off", "on"), DeclaredKind.BRANCH: ("nop", "jump")}
    state = states[one.kind][bool(one.begins_on)] if one.kind in states else ""
    return Path(one.file).name, one.line, one.kind.value, one.name, state


@each_build
def test_the_program_does_what_plain_c_does(built: Built, build: str) -> None:
    if "shared" not in build:
        assert subprocess.run([str(built(build))]).returncode == 0


@each_build
def test_notes_are_what_was_declared(built: Built, build: str) -> None:
    found = Counter(map(row_of, summarise_declared(ModuleImage.from_file(str(built(build))))))
    assert found == Counter(marked(build))


@each_build
def test_every_site_is_where_its_note_says(built: Built, build: str) -> None:
    for one in summarise_declared(ModuleImage.from_file(str(built(build)))):
        is_dynamic = one.kind is DeclaredKind.DYNAMIC_CALL
        if is_dynamic and "retpoline" not in build:
            assert one.size >= 2
            assert one.problem is not None
        else:
            assert one.problem is None
        if is_dynamic:
            assert one.type == {"handle": "int, int", "fold": "long, long, int, const char *"}.get(
                one.name or ""
            )


@each_build
def test_notes_need_no_relocation(built: Built, build: str) -> None:
    path = built(build)
    spans = ModuleImage.from_file(str(path)).facts.note_segments
    with path.open("rb") as stream:
        for section in ELFFile(stream).iter_sections():
            if isinstance(section, RelocationSection):
                for relocation in section.iter_relocations():
                    place = relocation["r_offset"]
                    assert not any(addr <= place < addr + size for addr, size in spans)


def test_the_readers_count_is_found_by_one_instruction(built: Built) -> None:
    # mov $imm32,%rax in a program, mov slot(%rip),%rax in a library.
    for build, opcode in (("c -O2", "48c7c0"), ("c -O2 shared", "488b05")):
        image = ModuleImage.from_file(str(built(build)))
        readers = read_declarations(image).readers
        assert readers is not None
        assert image.read(readers, 3).hex() == opcode
