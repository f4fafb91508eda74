# SPDX-License-Identifier: Apache-2.0
"""What a module declares: static keys, static calls and tables of dynamic calls.

1. Read the notes.
2. Put together what belongs together, by the address of the key or trampoline
   and by the name of the table; names that two things have are an error.
3. Compare the bytes at each site with what its note says.

Where a site is changed already (a key was switched, a call was set), its bytes
are one of the forms it can have; what they are compared with is the form, not
where it leads.

Non-goal: which instruction a call's note is near (``discover/nearby.py``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from optpoline.discover.declarations import (
    CallMark,
    CallTarget,
    Declarations,
    DynamicMark,
    KeyBranch,
    Place,
    StaticCall,
    StaticKey,
)
from optpoline.discover.image import ModuleImage
from optpoline.discover.notes import Note, NoteFlag, NoteKind, read_notes
from optpoline.errors import NotesError
from optpoline.model import Addr
from optpoline.x86.decode import Flow, decode_one

__all__ = ["read_declarations", "read_dynamic_marks"]

_CS_PREFIX = b"\x2e"
"""Fills a branch's instruction up so that what is changed lies in one aligned word."""

_BRANCH_NOP = bytes.fromhex("0f1f440000")
"""nopl 0(%rax,%rax,1): a branch that falls through."""

_BRANCH_SIZE = 5
_WORD_SIZE = 8
"""Also the alignment of a key, whose count is changed with one write."""

_JMP = b"\xe9"

_RENAME = "give one of them another name, and build it again: names are global to a module"
_REBUILD = "it is damaged, or somebody has written over its code: build it, or start it, again"

_BRANCHES = (Flow.CALL, Flow.JUMP, Flow.COND_JUMP, Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP)


def read_declarations(image: ModuleImage) -> Declarations:
    """Read what a module declares, and compare it with its bytes.

    Args:
        image: The module.

    Raises:
        NotesError: if notes are damaged, contradict each other or the text, or are too new.
        TargetFault: if its notes or text cannot be read.
    """
    notes = read_notes(image)
    if not notes:
        return Declarations()
    readers = [note.site for note in notes if note.kind is NoteKind.READERS]
    found = Declarations(
        keys=tuple(map(_key, _of(notes, NoteKind.KEY))),
        branches=tuple(map(_branch, _of(notes, NoteKind.BRANCH))),
        calls=tuple(map(_call, _of(notes, NoteKind.CALL))),
        targets=tuple(map(_target, _of(notes, NoteKind.CALL_TARGET))),
        call_marks=tuple(map(_call_mark, _of(notes, NoteKind.CALL_SITE))),
        dynamic=tuple(_dynamics(notes)),
        readers=readers[0] if readers else None,
    )
    _validate(found, image)
    return found


def read_dynamic_marks(image: ModuleImage) -> tuple[DynamicMark, ...]:
    """Read what a module says of its indirect calls, without a look at its text.

    What somebody has written over one of them, or over what else it declares, says nothing of
    the others.

    Raises:
        NotesError: if notes are damaged, or too new.
    """
    return tuple(_dynamics(read_notes(image)))


def _dynamics(notes: Iterable[Note]) -> Iterator[DynamicMark]:
    """Yield the marks of indirect calls."""
    return map(_dynamic, _of(notes, NoteKind.DYNAMIC_SITE, NoteKind.INDIRECT_SITE))


def _validate(found: Declarations, image: ModuleImage) -> None:
    """Raise an error where declarations contradict each other or the module's text.

    Raises:
        NotesError: if they do; it names the first that does.
        TargetFault: if the text cannot be read.
    """
    path = image.module.path
    for problem in _name_problems(found):
        raise NotesError(f"{path} declares {problem}", hint=_RENAME)
    for problem in (*_owner_problems(found), *_text_problems(found, image)):
        raise NotesError(f"{path} declares {problem}", hint=_REBUILD)


def _of(notes: Iterable[Note], *kinds: NoteKind) -> Iterator[Note]:
    """Yield the notes of some kinds, in the order of what they speak of."""
    return iter(
        sorted((n for n in notes if n.kind in kinds), key=lambda n: n.site or n.object or 0)
    )


def _place(note: Note) -> Place:
    """Say where in the source a note is from."""
    return Place(file=note.file or "", line=note.line)


def _known(addr: Addr | None) -> Addr:
    """Return a place that notes of this kind have (``read_notes`` sees to it)."""
    assert addr is not None
    return addr


def _key(note: Note) -> StaticKey:
    """Make a key of its note."""
    return StaticKey(
        name=note.name or "",
        addr=_known(note.object),
        is_on=NoteFlag.ON in note.flags,
        place=_place(note),
    )


def _branch(note: Note) -> KeyBranch:
    """Make a branch of its note."""
    return KeyBranch(
        addr=_known(note.site),
        size=note.size,
        key=_known(note.object),
        target=_known(note.target),
        is_inverted=NoteFlag.INVERTED in note.flags,
        begins_as_jump=NoteFlag.ON in note.flags,
        place=_place(note),
    )


def _call(note: Note) -> StaticCall:
    """Make a static call of its note."""
    return StaticCall(
        name=note.name or "",
        addr=_known(note.site),
        type=note.type,
        is_out_of_line=NoteFlag.OUT_OF_LINE in note.flags,
        place=_place(note),
    )


def _target(note: Note) -> CallTarget:
    """Make a target of its note."""
    return CallTarget(
        call=_known(note.object),
        name=note.name or "",
        addr=_known(note.target),
        place=_place(note),
    )


def _call_mark(note: Note) -> CallMark:
    """Make the mark of a static call's site of its note."""
    return CallMark(addr=_known(note.site), call=_known(note.object), place=_place(note))


def _dynamic(note: Note) -> DynamicMark:
    """Make the mark of an indirect call of its note."""
    return DynamicMark(
        addr=_known(note.site),
        is_near=NoteFlag.NEAR in note.flags,
        size=note.size,
        table=note.name,
        type=note.type,
        n_branches=note.argument,
        place=_place(note),
        is_excluded=NoteFlag.EXCLUDED in note.flags,
        register=note.register,
    )


def _name_problems(found: Declarations) -> Iterator[str]:
    """Yield a sentence for each name that two things have."""
    for what, named in (("static key", found.keys), ("static call", found.calls)):
        first: dict[str, StaticKey | StaticCall] = {}
        for one in named:
            other = first.setdefault(one.name, one)
            if other.addr != one.addr:
                yield f"two {what}s with the name {one.name} ({_two(other.place, one.place)})"
    tables: dict[str, DynamicMark] = {}
    for mark in found.dynamic:
        if mark.table is None:
            continue
        known = tables.setdefault(mark.table, mark)
        if (known.type, known.n_branches) != (mark.type, mark.n_branches):
            places = _two(known.place, mark.place)
            yield f"two tables of dynamic calls with the name {mark.table} ({places})"


def _two(first: Place, second: Place) -> str:
    """Name two places in the source."""
    return f"{first.file}:{first.line} and {second.file}:{second.line}"


def _owner_problems(found: Declarations) -> Iterator[str]:
    """Yield a sentence for each site whose key or call is not declared."""
    keys = {key.addr for key in found.keys}
    for branch in found.branches:
        if branch.key not in keys:
            yield f"a branch at {branch.addr:#x} on a key at {branch.key:#x}, where none is"
    calls = {call.addr for call in found.calls}
    for target in found.targets:
        if target.call not in calls:
            yield f"a target {target.name} of a static call at {target.call:#x}, where none is"
    for mark in found.call_marks:
        if mark.call not in calls:
            yield f"a site at {mark.addr:#x} of a static call at {mark.call:#x}, where none is"


def _text_problems(found: Declarations, image: ModuleImage) -> Iterator[str]:
    """Yield a sentence for each site whose bytes are none that it can have."""
    for key in found.keys:
        if key.addr % _WORD_SIZE or image.is_code(key.addr):
            yield f"the static key {key.name} at {key.addr:#x}, where none can be"
    for branch in found.branches:
        code = _code_at(image, branch.addr, branch.size)
        if not _is_branch_form(code, branch):
            yield f"a branch at {branch.addr:#x}, where the bytes {code.hex(' ')} are none"
        elif not image.is_code(branch.target):
            yield f"a branch at {branch.addr:#x} to {branch.target:#x}, where no code is"
    for call in found.calls:
        code = _code_at(image, call.addr, _BRANCH_SIZE)
        if not code.startswith(_JMP) or len(code) < _BRANCH_SIZE:
            yield f"the static call {call.name} at {call.addr:#x}, where no jump is"
    for target in found.targets:
        if not image.is_code(target.addr):
            yield f"a target {target.name} at {target.addr:#x}, where no code is"
    for mark in found.dynamic:
        code = _code_at(image, mark.addr, max(mark.size, 1))
        if not code or not (mark.is_near or _is_branch(code, mark.addr)):
            yield f"an indirect call at {mark.addr:#x}, where none is"


def _is_branch(code: bytes, addr: Addr) -> bool:
    """Say whether bytes are one instruction that may be an indirect branch, or lead to a thunk."""
    insn = decode_one(code, addr)
    return insn is not None and insn.size == len(code) and insn.flow in _BRANCHES


def _is_branch_form(code: bytes, branch: KeyBranch) -> bool:
    """Say whether an instruction is one of the two that a key's branch can be.

    Args:
        code: Its bytes, all of ``branch.size``.
        branch: The branch.
    """
    prefixes, body = code[:-_BRANCH_SIZE], code[-_BRANCH_SIZE:]
    if len(body) < _BRANCH_SIZE or prefixes.strip(_CS_PREFIX):
        return False
    if (branch.addr + len(prefixes)) % _WORD_SIZE > _WORD_SIZE - _BRANCH_SIZE:
        return False
    jump = _JMP + ((branch.target - branch.addr - len(code)) & 0xFFFFFFFF).to_bytes(4, "little")
    return body in (_BRANCH_NOP, jump)


def _code_at(image: ModuleImage, addr: Addr, size: int) -> bytes:
    """Return code as it is in memory; nothing outside the text.

    Raises:
        TargetFault: if the text cannot be read.
    """
    text = image.text_at(addr)
    return b"" if text is None else text.code_at(addr, size)
