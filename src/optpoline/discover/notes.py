# SPDX-License-Identifier: Apache-2.0
r"""Read the notes by which a module declares calls and branches that can be changed.

``optpoline.h`` and the compiler plugin write them. Each is an ELF note, owner
"optpoline", in a PT_NOTE segment, so it is found in stripped files and in memory,
without section headers::

    u32 10, u32 36, u32 0x706f, "optpoline\0", 2 bytes of padding
    +0   u8 version, u8 kind, u8 flags, u8 size of the instruction at the site
    +4   s32 site      +8   s32 object    +12  s32 target
    +16  s32 name      +20  s32 type      +24  s32 file      each: place minus own address
    +28  u32 line      +32  u32 argument

A place of 0 is none. Here notes are only taken apart, and every one is read or none:
what they mean together is of ``discover/declared.py``.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from enum import IntEnum, IntFlag

from optpoline.discover.image import ModuleImage
from optpoline.errors import NotesError, TargetFault
from optpoline.model import Addr

__all__ = ["NOTE_VERSION", "Note", "NoteFlag", "NoteKind", "read_notes"]

NOTE_VERSION = 1
"""OPTPOLINE_NOTE_VERSION of the header that belongs to this release."""

_OWNER = b"optpoline\0"
_TYPE = 0x706F
_HEADER = struct.Struct("<III")
"""Elf64_Nhdr: size of the owner, size of what follows it, type."""

_RECORD = struct.Struct("<BBBB6iII")
_FIRST_PLACE_OFF = 4
_PLACE_SIZE = 4

_MAX_TEXT_SIZE = 4096
"""Longest name, type or path of a file (PATH_MAX); a longer one is none."""

_TEXT_STEP = 128
"""Bytes read at once of a text whose length is not known."""


class NoteKind(IntEnum):
    """What a note speaks of."""

    KEY = 1
    """Object: the count of a static key."""
    BRANCH = 2
    """Site: a nop or jump; object: its key; target: where it jumps."""
    CALL = 3
    """Site and object: the trampoline of a static call."""
    CALL_SITE = 4
    """Site: near a call of a trampoline; object: that one."""
    CALL_TARGET = 5
    """Object: a trampoline; target: a function of its type; name: what it is called."""
    DYNAMIC_SITE = 6
    """Site: near an indirect call; name: its table; argument: branches at most, 0 for any."""
    READERS = 7
    """Site: the load of the offset of the count of open brackets from the thread pointer."""
    INDIRECT_SITE = 8
    """Site: an indirect branch that a compiler plugin marked; else as DYNAMIC_SITE. In the place of
    the object is the name of a register that is dead there and wherever it leads, or nothing:
    releases that know nothing of it take no notice."""


class NoteFlag(IntFlag):
    """Properties of what a note speaks of; which kinds have them says ``NoteKind``'s user."""

    ON = 1
    """A key begins enabled; a branch begins as a jump."""
    INVERTED = 2
    """A branch jumps while its key is disabled."""
    OUT_OF_LINE = 4
    """A static call is changed at its trampoline, not at its calls."""
    NEAR = 8
    """The site is the next call from that address on, not at it."""
    EXCLUDED = 16
    """The site's programmer does not want it changed."""
    COLD = 32
    """The site runs once or hardly ever, and is not padded."""
    GOTO = 64
    """The site leads to labels of its own function, not to functions."""


_ALLOWED_FLAGS: dict[NoteKind, NoteFlag] = {
    NoteKind.KEY: NoteFlag.ON,
    NoteKind.BRANCH: NoteFlag.ON | NoteFlag.INVERTED,
    NoteKind.CALL: NoteFlag.OUT_OF_LINE,
    NoteKind.CALL_SITE: NoteFlag.NEAR,
    NoteKind.CALL_TARGET: NoteFlag(0),
    NoteKind.DYNAMIC_SITE: NoteFlag.NEAR,
    NoteKind.READERS: NoteFlag(0),
    NoteKind.INDIRECT_SITE: NoteFlag.NEAR | NoteFlag.EXCLUDED | NoteFlag.COLD | NoteFlag.GOTO,
}

_REQUIRED: dict[NoteKind, tuple[str, ...]] = {
    NoteKind.KEY: ("object", "name"),
    NoteKind.BRANCH: ("site", "object", "target"),
    NoteKind.CALL: ("site", "object", "name"),
    NoteKind.CALL_SITE: ("site", "object"),
    NoteKind.CALL_TARGET: ("object", "target", "name"),
    NoteKind.DYNAMIC_SITE: ("site", "name"),
    NoteKind.READERS: ("site",),
    NoteKind.INDIRECT_SITE: ("site",),
}
"""Places that a note of a kind must have."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Note:
    """One note, its places resolved to addresses and texts.

    Attributes:
        addr: Of its record.
        kind: What it speaks of.
        flags: Properties of that.
        size: Of the instruction at the site in bytes, 0 if not known.
        site: An instruction, or None.
        object: What the site belongs to, or None.
        target: Where the site may lead, or None.
        name: Of the object, or None.
        type: Its type as written in the source, or None.
        file: Source file, or None.
        line: Line in it, 0 if not known.
        argument: A number whose meaning depends on the kind.
        register: As the compiler calls it, of an INDIRECT_SITE, or None.
    """

    addr: Addr
    kind: NoteKind
    flags: NoteFlag
    size: int
    site: Addr | None
    object: Addr | None
    target: Addr | None
    name: str | None
    type: str | None
    file: str | None
    line: int
    argument: int
    register: str | None = None


def read_notes(image: ModuleImage) -> tuple[Note, ...]:
    """Read all notes of a module, in the order of their addresses.

    Args:
        image: The module.

    Raises:
        NotesError: if one is of a newer version, cut off, or makes no sense, or if the
            segment of notes cannot be read.
    """
    bias = image.module.load_bias
    reader = _Reader(image)
    found: list[Note] = []
    for addr, size in image.facts.note_segments:
        if not any(
            s.addr <= addr and addr + size <= s.addr + s.file_size for s in image.facts.segments
        ):
            continue  # not in memory, so none of ours
        try:
            data = image.read(Addr(addr + bias), size)
        except TargetFault as fault:
            path = image.module.path
            raise NotesError(f"the notes of {path} at {addr + bias:#x} are cut off") from fault
        if _OWNER in data:
            found += [reader.note(raw, at) for raw, at in _records(data, addr + bias, reader)]
    return tuple(sorted(found, key=lambda note: note.addr))


def _records(data: bytes, addr: int, reader: _Reader) -> Iterator[tuple[bytes, Addr]]:
    """Yield each record of ours in a segment of notes, and its address."""
    pos = 0
    while pos < len(data):
        if len(data) - pos < _HEADER.size:
            raise reader.damaged(addr + pos, "is cut off")
        owner_size, size, kind = _HEADER.unpack_from(data, pos)
        start = pos + _HEADER.size
        record = start + _aligned(owner_size)
        end = record + _aligned(size)
        if record + size > len(data):
            raise reader.damaged(addr + pos, "is cut off")
        if data[start : start + owner_size] == _OWNER:
            if kind != _TYPE:
                raise reader.damaged(addr + pos, f"is of type {kind:#x}, not {_TYPE:#x}")
            yield data[record : record + size], Addr(addr + record)
        pos = end


def _aligned(size: int) -> int:
    """Round up to the alignment of notes."""
    return -(-size // 4) * 4


class _Reader:
    """Makes notes of records; knows the module they are in.

    Args:
        image: The module.
    """

    def __init__(self, image: ModuleImage) -> None:
        """Have read no text yet."""
        self._image = image
        self._texts: dict[Addr, str] = {}

    def damaged(self, addr: int, what: str) -> NotesError:
        """Return the error for a note that cannot be what a compiler wrote."""
        path = self._image.module.path
        return NotesError(
            f"the note at {addr:#x} of {path} {what}: its notes on declared sites are damaged",
            hint="build it again",
        )

    def note(self, record: bytes, addr: Addr) -> Note:
        """Take one record apart.

        Raises:
            NotesError: if it is of a newer version, or makes no sense.
        """
        version = record[0] if record else 0
        if version > NOTE_VERSION:
            raise NotesError(
                f"{self._image.module.path} has notes on declared sites of version {version}, "
                f"newer than {NOTE_VERSION}",
                hint="use the release of optpoline whose optpoline.h it was built with",
            )
        if version != NOTE_VERSION or len(record) != _RECORD.size:
            raise self.damaged(addr, f"has version {version} and {len(record)} bytes")
        _, raw_kind, raw_flags, size, *fields, line, argument = _RECORD.unpack(record)
        if raw_kind not in NoteKind.__members__.values():
            raise self.damaged(addr, f"is of the unknown kind {raw_kind}")
        kind = NoteKind(raw_kind)
        if raw_flags & ~_ALLOWED_FLAGS[kind].value:
            raise self.damaged(addr, f"has the unknown flags {raw_flags:#x}")
        places = [
            Addr(addr + _FIRST_PLACE_OFF + _PLACE_SIZE * index + field) if field else None
            for index, field in enumerate(fields)
        ]
        site, owner, target, name, type_, file = places
        present = {"site": site, "object": owner, "target": target, "name": name}
        for wanted in _REQUIRED[kind]:
            if present[wanted] is None:
                raise self.damaged(addr, f"has no {wanted}")
        for place in (site, owner, target):
            if place is not None and not self._is_inside(place):
                raise self.damaged(addr, f"points to {place:#x}, outside of it")
        is_named = kind is NoteKind.INDIRECT_SITE  # the object, by a text
        return Note(
            addr=addr,
            kind=kind,
            flags=NoteFlag(raw_flags),
            size=size,
            site=site,
            object=None if is_named else owner,
            target=target,
            name=self._text(addr, name),
            type=self._text(addr, type_),
            file=self._text(addr, file),
            line=line,
            argument=argument,
            register=self._text(addr, owner) if is_named else None,
        )

    def _is_inside(self, addr: Addr) -> bool:
        """Say whether an address is in the module's segments."""
        bias = self._image.module.load_bias
        segments = self._image.facts.segments
        return any(0 <= addr - bias - one.addr < one.memory_size for one in segments)

    def _text(self, note: Addr, addr: Addr | None) -> str | None:
        """Read a text that a note points to."""
        if addr is None:
            return None
        if addr not in self._texts:
            raw = self._read_text(addr)
            if not raw:
                raise self.damaged(note, f"has no text at {addr:#x}")
            self._texts[addr] = raw.decode("utf-8", "replace")
        return self._texts[addr]

    def _read_text(self, addr: Addr) -> bytes | None:
        """Read up to a zero byte; None if there is none within reason."""
        end = next(
            (start + size for start, size in self._image.data_ranges() if 0 <= addr - start < size),
            addr,
        )
        raw = b""
        while len(raw) < _MAX_TEXT_SIZE and (rest := end - addr - len(raw)) > 0:
            try:
                part = self._image.read(Addr(addr + len(raw)), min(_TEXT_STEP, rest))
            except TargetFault:
                return None
            before, zero, _ = part.partition(b"\0")
            raw += before
            if zero:
                return raw
        return None
