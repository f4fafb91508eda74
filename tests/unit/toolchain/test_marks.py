# SPDX-License-Identifier: Apache-2.0
"""Code that the plugin has marked: every indirect branch, exactly, and nothing else changed."""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
from elftools.dwarf.callframe import FDE
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from optpoline.cli.main import main
from optpoline.discover import ModuleImage, find_sites
from optpoline.discover.nearby import read_marked_sites
from optpoline.discover.notes import read_notes
from optpoline.model import Refusal
from tests.unit.toolchain.conftest import ROOT
from tests.unit.toolchain.marked_code import COLD, EXCLUDED, GOTO, Code, read_code

TARGETS = ROOT / "tests" / "targets"
SITE_SIZE = 5
_SITE_FIELD_OFF = 4
"""Of the field of a note that says which instruction it speaks of."""
CS = 0x2E
RUNTIME = frozenset(
    {"_start", "_init", "_fini", "deregister_tm_clones", "register_tm_clones", "frame_dummy"}
)
THUNKS = ("-mindirect-branch=thunk", "-mindirect-branch-register", "-fcf-protection=none")
SHARED = ("-shared", "-fPIC", "-nostdlib", "-fno-jump-tables")
BUILDS = (
    ("-O0",),
    ("-O2", "-g"),
    ("-Os", "-ffunction-sections", "-fdata-sections"),
    ("-O3", "-fcf-protection=full", "-masm=intel"),
    ("-O2", *THUNKS),
    ("-O2", "-flto", "-g"),
)


Make = Callable[..., Path]


@pytest.fixture(scope="module")
def make(plugin: Path, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Return a function that builds sources, once with the same flags."""
    directory = tmp_path_factory.mktemp("marked")
    made: dict[tuple[object, ...], Path] = {}

    def build(*names: str, flags: Sequence[str], use_plugin: bool = True) -> Path:
        key = (names, tuple(flags), use_plugin)
        if key not in made:
            output = directory / f"out-{len(made)}"
            compiler = "gcc" if names[0].endswith(".c") else "g++"
            loading = [f"-fplugin={plugin}"] if use_plugin else ["-Wno-attributes"]
            sources = [str(TARGETS / name) for name in names]
            argv = [compiler, *loading, *flags, *sources, "-o", str(output)]
            subprocess.run(argv, check=True, timeout=60)
            made[key] = output
        return made[key]

    return build


def read(path: Path) -> Code:
    return read_code(path, runtime=RUNTIME)


def check_marks(code: Code) -> None:
    """Every branch has its note, every note its branch, and each is as long as it must be."""
    assert set(code.notes) == set(code.branches)
    for addr, insn in code.branches.items():
        note = code.notes[addr]
        assert note.length == insn.size
        if not note.flags & (EXCLUDED | COLD):
            assert insn.size >= SITE_SIZE
        is_in_memory = "(" in insn.op_str or "[" in insn.op_str
        assert bool(note.register) <= is_in_memory
        if insn.bytes[0] == CS:
            n_prefixes = len(insn.bytes) - len(bytes(insn.bytes).lstrip(bytes((CS,))))
            is_one = n_prefixes == 1 and bool(note.register)
            assert insn.size == SITE_SIZE or is_one, "more prefixes than needed"
            assert not note.flags & (EXCLUDED | COLD), "padded for nothing"


@pytest.mark.parametrize("flags", BUILDS, ids=" ".join)
def test_every_branch_and_nothing_else(make: Make, flags: tuple[str, ...]) -> None:
    code = read(make("marked.c", flags=(*flags, *SHARED)))
    check_marks(code)
    assert len(code.notes) >= 20
    typed = [note.type for note in code.notes.values() if not note.flags & GOTO]
    assert all(typed)
    source = (TARGETS / "marked.c").read_text().splitlines()
    lines = {number for number, line in enumerate(source, 1) if line.endswith("// site")}
    noted = {note.line for note in code.notes.values()}
    # Of gotos that were merged the line is not known; no other is ever wrong.
    assert noted - {0} <= lines
    assert {note.line for note in code.notes.values() if not note.flags & GOTO} <= lines


@pytest.mark.parametrize("flags", BUILDS[:5], ids=" ".join)
def test_no_instruction_more(make: Make, flags: tuple[str, ...]) -> None:
    with_plugin = read(make("marked.c", flags=(*flags, *SHARED)))
    without = read(make("marked.c", flags=(*flags, *SHARED), use_plugin=False))
    assert not without.notes
    assert with_plugin.insns.keys() == without.insns.keys()
    for name, insns in without.insns.items():
        assert with_plugin.insns[name] == insns, name


WISHES = {
    "field": (0, 0, "int(struct ops *, int)"),
    "quiet_field": (EXCLUDED, 0, "void(void)"),
    "loud_field": (0, 4, "long int(char *, ...)"),
    "quiet_typedef": (EXCLUDED, 0, "int(int)"),
    "quiet_struct": (EXCLUDED, 0, "int(int)"),
    "array": (0, 0, "int(number)"),
    "loud_array": (0, 7, "int(int)"),
    "quiet_parameter": (EXCLUDED, 0, "int(int)"),
    "has_inlined": (0, 0, "int(struct ops *, int)"),
    "loud_function": (0, 2, "int(number)"),
    "cold_function": (COLD, 0, "int(number)"),
    "set_up": (COLD, 0, "int(number)"),
    "start_up": (COLD, 0, "int(number)"),
}
ASKED_FOR = {"loud_field", "loud_array", "loud_function"}


@pytest.mark.parametrize("flags", [("-O0",), ("-O2", "-g"), ("-O2", "-flto", "-g")], ids=" ".join)
def test_attributes(make: Make, flags: tuple[str, ...]) -> None:
    code = read(make("marked.c", flags=(*flags, *SHARED)))
    for function, expected in WISHES.items():
        (note,) = code.noted_in(function)
        assert (note.flags, note.n_branches, note.type) == expected, function
    assert [note.flags for note in code.noted_in("quiet_function")] == [EXCLUDED, EXCLUDED]


def test_sites_have_what_their_source_says(make: Make) -> None:
    path = make("marked.c", flags=("-O2", *THUNKS, *SHARED))
    code = read(path)
    sites = find_sites(ModuleImage.from_file(str(path))).sites
    assert {site.addr for site in sites} == set(code.notes)
    for site in sites:
        note = code.notes[site.addr]
        assert (site.refusal is Refusal.EXCLUDED) == bool(note.flags & EXCLUDED), site
        assert site.max_guards == note.n_branches, site


WRONG_NOTE = """
int first(int (*call)(int), int (*other)(int))
{
    /* movabs $imm64, %rax: what a wrong note speaks of is no instruction */
    __asm__("wrong: .byte 0x48, 0xb8, 0x2e, 0x2e, 0x2e, 0xff, 0xd0, 0, 0, 0" ::: "rax");
    return call(1) + other(2) + 1;
}
"""


def move_first_note(path: Path, symbol: str, off: int) -> Path:
    """Return a copy of a program whose first note speaks of another address: a symbol's + off."""
    note = min(read_notes(ModuleImage.from_file(str(path))), key=lambda note: note.site or 0)
    field_addr = note.addr + _SITE_FIELD_OFF
    raw = bytearray(path.read_bytes())
    with path.open("rb") as file:
        elf = ELFFile(file)
        (at,) = elf.address_offsets(field_addr)
        table = elf.get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        found = next(one for one in table.iter_symbols() if one.name == symbol)
    moved = found["st_value"] + off - field_addr
    raw[at : at + 4] = moved.to_bytes(4, "little", signed=True)
    copy = path.with_name("moved.so")
    copy.write_bytes(raw)
    return copy


def test_a_note_that_speaks_of_the_middle_of_an_instruction(plugin: Path, tmp_path: Path) -> None:
    (tmp_path / "wrong.c").write_text(WRONG_NOTE)
    path = tmp_path / "wrong.so"
    argv = ["gcc", "-O2", *SHARED, f"-fplugin={plugin}", str(tmp_path / "wrong.c"), "-o", str(path)]
    subprocess.run(argv, check=True, timeout=60)
    scan = find_sites(ModuleImage.from_file(str(path)))
    assert [site.is_plain for site in scan.sites] == [True, True]
    moved_path = move_first_note(path, "wrong", 2)
    moved = find_sites(ModuleImage.from_file(str(moved_path)))
    assert moved.sites == (replace(scan.sites[1], module=str(moved_path)),)
    assert moved.n_unverified == 1


def test_notes_that_cannot_be_read_may_exclude_anything(make: Make, tmp_path: Path) -> None:
    path = make("marked.c", flags=("-O2", *THUNKS, *SHARED))
    raw = path.read_bytes()
    version_at = raw.index(b"optpoline\0\0\0\1") + len(b"optpoline\0\0\0")
    damaged = tmp_path / "damaged.so"
    damaged.write_bytes(raw[:version_at] + b"\x63" + raw[version_at + 1 :])
    sites = find_sites(ModuleImage.from_file(str(damaged))).sites
    assert len(sites) == len(find_sites(ModuleImage.from_file(str(path))).sites)
    assert {site.refusal for site in sites} == {Refusal.DAMAGED_NOTES}


def test_a_plugin_of_another_compiler_is_not_loaded(plugin: Path, tmp_path: Path) -> None:
    def load() -> subprocess.CompletedProcess[str]:
        argv = ["gcc", "-c", f"-fplugin={other}", "-x", "c", "/dev/null", "-o", "/dev/null"]
        return subprocess.run(argv, capture_output=True, text=True, timeout=60)

    version = subprocess.run(["gcc", "-dumpfullversion"], capture_output=True).stdout.strip()
    other = tmp_path / plugin.name
    other.write_bytes(plugin.read_bytes())
    assert load().returncode == 0
    nines = b"9" * len(version)
    other.write_bytes(plugin.read_bytes().replace(b"\0%b\0" % version, b"\0%b\0" % nines))
    done = load()
    assert done.returncode != 0
    assert f"the plugin was built for GCC {nines.decode()} " in done.stderr
    assert "optpoline plugin build" in done.stderr


def test_a_dynamic_call_of_the_header_that_is_marked_too(plugin: Path, tmp_path: Path) -> None:
    source = tmp_path / "twice.c"
    source.write_text(
        '#include "optpoline.h"\n'
        "DYNAMIC_CALL_TABLE_BRANCHES(filters, 3, int, int);\n"
        "int first(int (*call)(int), int (*other)(int))\n"
        "{ return dynamic_call(filters, call, 1) + other(2) + 1; }\n"
    )
    path = tmp_path / "twice.so"
    include = ROOT / "src" / "optpoline" / "share" / "include"
    flags = ["-O2", *SHARED, *THUNKS, f"-I{include}", f"-fplugin={plugin}"]
    subprocess.run(["gcc", *flags, str(source), "-o", str(path)], check=True, timeout=60)
    image = ModuleImage.from_file(str(path))
    marks = [site.mark for site in read_marked_sites(image).values()]
    assert [(mark.table, mark.n_branches) for mark in marks] == [("filters", 3), (None, 0)]
    assert [site.max_guards for site in find_sites(image).sites] == [3, 0]


def test_opt_in(make: Make) -> None:
    flags = ("-O2", *SHARED, "-fplugin-arg-optpoline-mode=opt-in")
    code = read(make("marked.c", flags=flags))
    check_marks(code)
    for addr, note in code.notes.items():
        assert bool(note.flags & EXCLUDED) == (code.functions[addr] not in ASKED_FOR)


def test_jumps(make: Make) -> None:
    code = read(make("marked.c", flags=("-O2", "-g", *SHARED)))
    jumps = {
        code.functions[addr]: code.notes[addr]
        for addr, insn in code.branches.items()
        if insn.mnemonic.endswith("jmp")
    }
    assert {"tail", "computed"} <= set(jumps)
    for function, note in jumps.items():
        assert bool(note.flags & GOTO) == (function == "computed")
    assert [bool(note.type) for note in code.noted_in("computed")] == [False, False, False]


def test_switches_are_not_marked(make: Make) -> None:
    code = read(make("marked.c", flags=("-O2", "-shared", "-fPIC", "-nostdlib")))
    jumps = set(code.branches) - set(code.notes)
    assert [code.functions[addr] for addr in jumps] == ["chosen"]
    assert len(code.noted_in("chosen")) == 1


@pytest.mark.parametrize("flags", [("-O0",), ("-O2", "-g"), ("-O2", *THUNKS)], ids=" ".join)
def test_marked_programs_work(make: Make, flags: tuple[str, ...]) -> None:
    subprocess.run([make("marked.c", flags=flags)], check=True, timeout=10)


UNUSED = """
int (*call)(int);
int used(int i) { return call(i) + 1; }
int unused(int i) { return call(i) + 2; }
int main(void) { return call ? used(1) : 0; }
"""


@pytest.mark.parametrize("linker", ["bfd", "lld"])
def test_notes_share_the_fate_of_their_code(plugin: Path, tmp_path: Path, linker: str) -> None:
    if not shutil.which(f"ld.{linker}"):
        pytest.skip(f"ld.{linker} is not installed")
    program = tmp_path / "program"
    linking = (f"-fuse-ld={linker}", "-ffunction-sections", "-Wl,--gc-sections")
    argv = ["gcc", f"-fplugin={plugin}", "-O1", *linking, "-x", "c", "-", "-o", str(program)]
    subprocess.run(argv, input=UNUSED, text=True, check=True, timeout=60)
    code = read(program)
    check_marks(code)
    assert "used" in code.insns
    assert "unused" not in code.insns
    assert len(code.notes) == 1


def test_linked_into_one_program(make: Make, plugin: Path, tmp_path: Path) -> None:
    source = str(TARGETS / "marked_virtual.cc")
    for name, defined in (("one", ()), ("two", ("-DSECOND",))):
        argv = ["g++", f"-fplugin={plugin}", "-O2", "-g", *defined, "-c", source]
        subprocess.run([*argv, "-o", tmp_path / f"{name}.o"], check=True, timeout=60)
    program = tmp_path / "program"
    argv = ["g++", str(tmp_path / "one.o"), str(tmp_path / "two.o"), "-o", str(program)]
    subprocess.run(argv, check=True, timeout=60)
    subprocess.run([program], check=True, timeout=10)
    code = read(program)
    check_marks(code)
    # Both units had it, in a group of which one was kept.
    (shared,) = code.noted_in("_ZN7measureI5shapeE2ofEPS0_i")
    assert shared.type == "int (shape::)(int)"
    (silent,) = code.noted_in("_Z11call_silentP6silenti")
    assert silent.flags == EXCLUDED
    assert silent.file == source


def test_stripped(make: Make, tmp_path: Path) -> None:
    whole = make("marked.c", flags=("-O2", "-g", *SHARED))
    stripped = tmp_path / "stripped"
    subprocess.run(["strip", "-o", stripped, whole], check=True, timeout=10)
    assert read(stripped).notes == read(whole).notes


def test_debug_information_knows_no_place_inside_a_site(make: Make) -> None:
    path = make("marked.c", flags=("-O2", "-g", *SHARED))
    code = read(path)
    with path.open("rb") as stream:
        dwarf = ELFFile(stream).get_dwarf_info()
        places = {
            entry.state.address
            for unit in dwarf.iter_CUs()
            if (lines := dwarf.line_program_for_CU(unit)) is not None
            for entry in lines.get_entries()
            if entry.state is not None
        }
        for frame in dwarf.EH_CFI_entries():
            if isinstance(frame, FDE):
                places |= {int(row["pc"]) for row in frame.get_decoded().table}
    assert len(places & set(code.notes)) > 5
    for note in code.notes.values():
        assert not places & set(range(note.site + 1, note.site + note.length))


def test_source_prefixes_are_mapped(make: Make) -> None:
    code = read(make("marked.c", flags=("-O2", *SHARED, f"-ffile-prefix-map={TARGETS}=src")))
    assert {note.file for note in code.notes.values()} == {"src/marked.c"}


@pytest.mark.parametrize(
    ("flags", "text", "said"),
    [
        (("-fplugin-arg-optpoline-mode=all",), "", "mode=opt-out"),
        (("-fplugin-arg-optpoline-moed=opt-in",), "", "unknown option"),
        (("-mindirect-branch=thunk-inline", "-fcf-protection=none"), "", "nothing to patch"),
        ((), "void f(void) __attribute__((optpoline(0)));", "from 1 to 255"),
        ((), 'void f(void) __attribute__((optpoline("x")));', "from 1 to 255"),
    ],
)
def test_what_is_wrong_is_said(plugin: Path, flags: tuple[str, ...], text: str, said: str) -> None:
    argv = ["gcc", f"-fplugin={plugin}", *flags, "-x", "c", "-", "-S", "-o", "/dev/null"]
    done = subprocess.run(argv, input=text, capture_output=True, text=True, timeout=30, check=False)
    assert done.returncode != 0
    assert said in done.stderr
    assert "internal compiler error" not in done.stderr


def test_sites_lists_what_is_marked(make: Make, capsys: pytest.CaptureFixture[str]) -> None:
    path = make("marked.c", flags=("-O2", "-g", *SHARED))
    assert main(["sites", str(path), "--json", "-"]) == 0
    document = json.loads(capsys.readouterr().out)
    code = read(path)
    assert {int(one["address"], 16) for one in document["declared"]} == set(code.notes)
