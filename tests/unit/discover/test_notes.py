# SPDX-License-Identifier: Apache-2.0
"""Damaged, truncated, newer and contradicting notes are one clear error each."""

from __future__ import annotations

import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from optpoline.controller.declared_summaries import summarise_declared
from optpoline.discover.declarations import Declarations
from optpoline.discover.declared import read_declarations
from optpoline.discover.image import ModuleImage
from optpoline.discover.notes import NoteKind, read_notes
from optpoline.errors import NotesError
from optpoline.model import Addr
from optpoline.process.memory import Memory

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"

KIND_OFF, FLAGS_OFF, SIZE_OFF = 1, 2, 3
SITE_OFF, OBJECT_OFF, TARGET_OFF, NAME_OFF, TYPE_OFF = 4, 8, 12, 16, 20
"""Of the fields of a record."""


class DamagedMemory:
    """A module's memory with some bytes replaced."""

    def __init__(self, image: ModuleImage) -> None:
        """Replace nothing yet."""
        self._image = image
        self.bytes: dict[int, int] = {}

    def read(self, addr: int, size: int) -> bytes:
        """Read memory as damaged."""
        data = bytearray(self._image.read(Addr(addr), size))
        for where, value in self.bytes.items():
            if addr <= where < addr + size:
                data[where - addr] = value
        return bytes(data)

    def write(self, addr: int, data: bytes) -> None:
        """Replace bytes."""
        self.bytes.update(enumerate(data, addr))


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> ModuleImage:
    """Build the project once."""
    path = tmp_path_factory.mktemp("notes") / "project"
    sources = [str(PROJECT / "main.c"), str(PROJECT / "other.c")]
    command = ["gcc", "-O1", "-s", f"-I{INCLUDE}", *sources, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return ModuleImage.from_file(str(path))


def image_of(program: ModuleImage, memory: Memory) -> ModuleImage:
    """Return the program with other memory; its text is read from there."""
    module = replace(program.module, mappings=())
    files = tuple(
        replace(held, data=memory.read(held.segment.addr, len(held.data)))
        for held in program._files
    )
    return ModuleImage(module, memory, program.facts, files)


def read_damaged(program: ModuleImage, *writes: tuple[int, bytes]) -> Declarations:
    """Read the declarations of the program with some bytes replaced."""
    memory = DamagedMemory(program)
    for addr, data in writes:
        memory.write(addr, data)
    return read_declarations(image_of(program, memory))


def record_of(program: ModuleImage, kind: NoteKind, index: int = 0) -> Addr:
    """Return the address of the n-th record of a kind."""
    return [note.addr for note in read_notes(program) if note.kind is kind][index]


def place(record: int, off: int, addr: int) -> tuple[int, bytes]:
    """Make a field of a record lead to an address."""
    return record + off, (addr - record - off).to_bytes(4, "little", signed=True)


def test_the_program_is_whole(program: ModuleImage) -> None:
    found = read_damaged(program)
    assert [len(found.keys), len(found.calls), len(found.targets)] == [2, 4, 2]
    assert len(found.branches) == 6
    assert len(found.dynamic) == 4


def test_a_newer_version(program: ModuleImage) -> None:
    record = record_of(program, NoteKind.KEY)
    with pytest.raises(NotesError, match="of version 2, newer than 1; use the release"):
        read_damaged(program, (record, b"\x02"))


@pytest.mark.parametrize(
    ("off", "data", "message"),
    [
        (0, b"\0", "has version 0 and 36 bytes"),
        (KIND_OFF, b"\x63", "is of the unknown kind 99"),
        (FLAGS_OFF, b"\x80", "has the unknown flags 0x80"),
        (SITE_OFF, bytes(4), "has no site"),
        (OBJECT_OFF, bytes(4), "has no object"),
        (TARGET_OFF, b"\xff\xff\xff\x7f", "points to 0x[0-9a-f]+, outside of it"),
        (-24 + 8, b"\x01\0\0\0", "is of type 0x1, not 0x706f"),
        (-24 + 4, b"\xff\xff\xff\xff", "is cut off"),
        (-24 + 4, b"\x20\0\0\0", "has version 1 and 32 bytes"),
    ],
)
def test_damaged_records(program: ModuleImage, off: int, data: bytes, message: str) -> None:
    record = record_of(program, NoteKind.BRANCH)
    with pytest.raises(NotesError, match=message):
        read_damaged(program, (record + off, data))


def test_a_name_that_is_no_text(program: ModuleImage) -> None:
    record = record_of(program, NoteKind.KEY)
    end = max(segment.addr + segment.memory_size for segment in program.facts.segments)
    with pytest.raises(NotesError, match="has no text at 0x"):
        read_damaged(program, place(record, NAME_OFF, end - 1))


@pytest.mark.parametrize("cut", [1, 4, 30, 59])
def test_truncated_notes(program: ModuleImage, cut: int) -> None:
    segments = program.facts.note_segments
    ours = next(one for one in segments if one[0] <= read_notes(program)[0].addr < sum(one))
    shorter = tuple((addr, size - cut * (one == ours)) for one in segments for addr, size in [one])
    facts = replace(program.facts, note_segments=shorter)
    with pytest.raises(NotesError, match="is cut off"):
        read_notes(ModuleImage(program.module, DamagedMemory(program), facts, ()))


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (NoteKind.KEY, r"two static keys with the name \w+ \(.*main.c:\d+ and .*main.c:\d+\)"),
        (NoteKind.CALL, r"two static calls with the name \w+ \(.*main.c:\d+ and .*main.c:\d+\)"),
    ],
)
def test_duplicate_names(program: ModuleImage, kind: NoteKind, message: str) -> None:
    first, second = (record_of(program, kind, index) for index in range(2))
    name = next(note.name for note in read_notes(program) if note.addr == first)
    assert name is not None
    field = int.from_bytes(program.read(Addr(first + NAME_OFF), 4), "little", signed=True)
    with pytest.raises(NotesError, match=message):
        read_damaged(program, place(second, NAME_OFF, first + NAME_OFF + field))


def test_a_table_of_two_types(program: ModuleImage) -> None:
    same = [
        note for note in read_notes(program)
        if note.kind is NoteKind.DYNAMIC_SITE and note.name == "handle"
    ]  # fmt: skip
    # The type without its first letter.
    field = int.from_bytes(program.read(Addr(same[0].addr + TYPE_OFF), 4), "little", signed=True)
    with pytest.raises(NotesError, match="two tables of dynamic calls with the name handle"):
        read_damaged(program, place(same[0].addr, TYPE_OFF, same[0].addr + TYPE_OFF + field + 1))


def test_a_branch_on_no_key(program: ModuleImage) -> None:
    record = record_of(program, NoteKind.BRANCH)
    field = int.from_bytes(program.read(Addr(record + OBJECT_OFF), 4), "little", signed=True)
    with pytest.raises(NotesError, match=r"on a key at 0x\w+, where none is"):
        read_damaged(program, place(record, OBJECT_OFF, record + OBJECT_OFF + field + 4))


def test_a_key_whose_count_would_overwrite_something_else(program: ModuleImage) -> None:
    """All that belongs to a key says that it is somewhere else."""
    notes = read_notes(program)
    key = next(note for note in notes if note.kind is NoteKind.KEY)
    assert key.object is not None
    text = -(-program.code_ranges[0].start // 8) * 8
    for elsewhere in (Addr(text), Addr(key.object + 1)):
        moved = [note.addr for note in notes if note.object == key.object]
        with pytest.raises(NotesError, match=rf"static key {key.name} at 0x\w+, where none can"):
            read_damaged(program, *(place(record, OBJECT_OFF, elsewhere) for record in moved))


def test_bytes_that_are_no_branch(program: ModuleImage) -> None:
    branch = read_declarations(program).branches[0]
    other = (branch.addr + branch.size - 1, b"\x55")
    with pytest.raises(NotesError, match=r"a branch at 0x\w+, where the bytes [0-9a-f ]+ are none"):
        read_damaged(program, other)


def test_a_branch_may_have_been_switched(program: ModuleImage) -> None:
    whole = read_declarations(program)
    for branch in whole.branches:
        end = branch.addr + branch.size
        jump = b"\xe9" + (branch.target - end).to_bytes(4, "little", signed=True)
        for form in (jump, bytes.fromhex("0f1f440000")):
            assert read_damaged(program, (end - 5, form)) == whole


def test_a_static_call_may_lead_elsewhere_but_stays_a_jump(program: ModuleImage) -> None:
    whole = read_declarations(program)
    call = whole.calls[0]
    assert read_damaged(program, (call.addr + 1, b"\x10")) == whole
    with pytest.raises(NotesError, match=rf"the static call {call.name} at 0x\w+, where no jump"):
        read_damaged(program, (call.addr, b"\xeb"))


def test_no_section_headers_are_needed(program: ModuleImage, tmp_path: Path) -> None:
    data = bytearray(Path(program.module.path).read_bytes())
    data[0x28:0x30] = bytes(8)  # e_shoff
    data[0x3C:0x40] = bytes(4)  # e_shnum, e_shstrndx
    path = tmp_path / "program"
    path.write_bytes(data)
    assert read_declarations(ModuleImage.from_file(str(path))) == read_declarations(program)


def test_segments_of_notes_that_are_not_there(program: ModuleImage) -> None:
    end = max(segment.addr + segment.memory_size for segment in program.facts.segments)
    facts = replace(program.facts, note_segments=((end, 1 << 40), (0, 1 << 40)))
    assert read_notes(ModuleImage(program.module, DamagedMemory(program), facts, ())) == ()


def test_a_file_that_ends_before_its_notes(program: ModuleImage, tmp_path: Path) -> None:
    path = tmp_path / "program"
    data = bytearray(Path(program.module.path).read_bytes()[: read_notes(program)[0].addr])
    data[0x28:0x30] = bytes(8)  # e_shoff
    data[0x3C:0x40] = bytes(4)  # e_shnum, e_shstrndx
    path.write_bytes(data)
    with pytest.raises(NotesError, match=r"the notes of .*/program at 0x\w+ are cut off"):
        read_notes(ModuleImage.from_file(str(path)))


def test_foreign_notes_are_not_ours_to_judge(program: ModuleImage) -> None:
    segments = program.facts.note_segments
    ours = next(one for one in segments if one[0] <= read_notes(program)[0].addr < sum(one))
    foreign = next(one for one in segments if one != ours)
    assert read_damaged(program, (foreign[0], b"\xff" * 12)).keys


@settings(
    max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_damage_is_an_error_or_does_no_harm(program: ModuleImage, data: st.DataObject) -> None:
    notes = read_notes(program)
    note = data.draw(st.sampled_from(notes))
    off = data.draw(st.integers(-24, 35))
    new = data.draw(st.binary(min_size=1, max_size=8))
    memory = DamagedMemory(program)
    memory.write(note.addr + off, new)
    message = program.module.path
    try:
        found = summarise_declared(image_of(program, memory))
    except NotesError as error:
        found, message = (), error.message
    assert program.module.path in message
    # What is told is still in the module.
    assert all(program.module.start <= one.address < program.module.end for one in found)
