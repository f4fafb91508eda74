# SPDX-License-Identifier: Apache-2.0
"""What can be changed in a program's declared keys and static calls: every site, both forms.

The notes of a module and the text of its file say all of it. So there is no journal to
keep, and none to lose: whoever comes later, with whatever was left by a controller that
was killed, finds the same sites and what they held at first. Branches on keys are noted
themselves. Calls of a static call are not: they are the branches to its trampoline *in
the file*, for in memory they may lead elsewhere by now.

A thing is a *key*, with its count and branches, or a *static call*, with its trampoline
and calls. The count and the trampoline are the word on what state it is in; branches and
calls follow.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass

from optpoline.controller.module_files import ModuleFile, read_module_file
from optpoline.discover import Declarations, ModuleImage, find_call_sites, read_declarations
from optpoline.discover.declarations import CallTarget, KeyBranch, StaticCall, StaticKey
from optpoline.discover.readers import find_readers_offset
from optpoline.errors import NotesError, TargetFault, UnsupportedTarget
from optpoline.model import Addr, Module
from optpoline.patch.layout import ARENA_NAME, JournalEntry
from optpoline.patch.placement import is_within_reach
from optpoline.process.memory import Memory
from optpoline.process.modules import list_modules, open_module
from optpoline.x86.assembler import encode_disp32

__all__ = [
    "BranchSite",
    "DeclaredCall",
    "DeclaredKey",
    "DeclaredModule",
    "read_declared_module",
    "read_declaring_image",
]

_OWNER = b"optpoline\0"
_COUNT_SIZE = 4
_DISP_SIZE = 4
_TRAMPOLINE_SIZE = 5
_OPCODE_SIZE = 1
_PAGE_SIZE = 4096
_MAX_READS = 4
"""How often a module is read that seems damaged: it may be unloaded, and loaded again."""

_NOP = bytes.fromhex("0f1f440000")
"""nopl 0(%rax,%rax,1)."""

_JMP = b"\xe9"
_RETURNS_NOTHING = b"\xc3"  # ret
_RETURNS_ZERO = b"\x31\xc0\xc3"  # xor eax, eax; ret


@dataclass(frozen=True, slots=True, kw_only=True)
class BranchSite:
    """A branch on a key.

    Attributes:
        entry: Its instruction; what changes are its last five bytes.
        forms: Those five while its key is disabled, and while it is enabled.
    """

    entry: JournalEntry
    forms: tuple[bytes, bytes]


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredKey:
    """A key of one module.

    Attributes:
        key: What the source says.
        branches: The branches on it.
    """

    key: StaticKey
    branches: tuple[BranchSite, ...]

    def count_entry(self) -> JournalEntry:
        """Return the entry of its count, a u32 that is changed with its branches."""
        return JournalEntry(addr=self.key.addr, code=bytes(_COUNT_SIZE), disp_off=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredCall:
    """A static call of one module.

    Attributes:
        call: What the source says.
        trampoline: Its trampoline as in the file.
        sites: The calls that are changed themselves, as in the file; none of an out-of-line
            one, and none whose displacement crosses a page: those lead to the trampoline.
        default_name: What it calls in the file, by the source: "NULL" for nothing, "0" for
            what returns zero, "?" if the source does not tell.
        default_addr: Where that is.
        span: First and last address after an instruction that is changed.
        targets: What it may be given, by the source.
        is_file_known: Whether the file could be read. If not, calls that were changed before
            cannot be found.
    """

    call: StaticCall
    trampoline: JournalEntry
    sites: tuple[JournalEntry, ...]
    default_name: str
    default_addr: Addr
    span: tuple[Addr, Addr]
    targets: tuple[CallTarget, ...]
    is_file_known: bool

    def name_of(self, addr: Addr) -> str | None:
        """Return what a target of it is called in the source, or None."""
        if addr == self.default_addr:
            return self.default_name
        return next((one.name for one in self.targets if one.addr == addr), None)

    def reaches(self, addr: Addr) -> bool:
        """Tell whether every instruction that is changed reaches an address."""
        return all(is_within_reach(end, addr) for end in self.span)

    @property
    def may_be_changed(self) -> bool:
        """Whether all that has to be changed is known."""
        return self.is_file_known or self.call.is_out_of_line


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredModule:
    """What can be changed in one module.

    Attributes:
        image: The module, its text as in its file.
        keys: Its keys.
        calls: Its static calls.
        readers_offset: Where a thread's count of open brackets is, from its thread pointer;
            None if the module brackets nothing.
    """

    image: ModuleImage
    keys: tuple[DeclaredKey, ...]
    calls: tuple[DeclaredCall, ...]
    readers_offset: int | None

    def entries(self) -> Iterator[JournalEntry]:
        """Yield every instruction of it that may be changed."""
        for key in self.keys:
            yield from (branch.entry for branch in key.branches)
        for call in self.calls:
            yield call.trampoline
            yield from call.sites


class _TextOfFile:
    """A program's memory with a module's text as its file has it.

    Args:
        memory: The program's memory.
        file: The module's file; None if it cannot be had.
    """

    def __init__(self, memory: Memory, file: ModuleFile | None) -> None:
        """Read nothing yet."""
        self._memory = memory
        self._file = file

    def read(self, addr: int, size: int) -> bytes:
        """Return exactly size bytes, or raise ``TargetFault``."""
        data = bytearray(self._memory.read(addr, size))
        for start, held in self._file.segments if self._file is not None else ():
            low, high = max(addr, start), min(addr + size, start + len(held))
            if low < high:
                data[low - addr : high - addr] = held[low - start : high - start]
        return bytes(data)


def read_declared_module(pid: int, module: Module, memory: Memory) -> DeclaredModule | None:
    """Read what can be changed in a module; None if it declares nothing.

    Nothing is stopped. A module without notes costs a few small reads.

    Raises:
        NotesError: if its notes are damaged, contradict its text, or are too new.
        TargetFault: if it cannot be read: it was unloaded meanwhile.
    """
    for _ in range(_MAX_READS - 1):
        with suppress(NotesError, TargetFault):
            return _read_once(pid, module, memory)
        # Of what was unloaded while it was read, half looks as if it were damaged.
        if module not in list_modules(pid, memory=memory):
            raise TargetFault(module.start, module.end - module.start, "read", pid=pid)
    return _read_once(pid, module, memory)


def _read_once(pid: int, module: Module, memory: Memory) -> DeclaredModule | None:
    """Do that; a module that is unloaded meanwhile may seem damaged."""
    image = read_declaring_image(pid, module, memory)
    if image is None:
        return None
    declared = read_declarations(image)
    return DeclaredModule(
        image=image,
        keys=tuple(_key(key, declared, image) for key in declared.keys),
        calls=_calls(declared, image, is_file_known=image.has_file_text),
        readers_offset=find_readers_offset(image, declared),
    )


def read_declaring_image(pid: int, module: Module, memory: Memory) -> ModuleImage | None:
    """Return a module that may declare anything, its text as in its file; else None.

    Where the file cannot be read its text is that in memory.
    """
    if module.name.startswith(f"memfd:{ARENA_NAME}") or not _has_notes(module, memory):
        return None
    file = read_module_file(pid, module, memory)
    stream = open_module(pid, module)
    try:
        return ModuleImage.from_process(module, _TextOfFile(memory, file), stream)
    finally:
        if stream is not None:
            stream.close()


def _has_notes(module: Module, memory: Memory) -> bool:
    """Tell whether a module may have notes of ours; what cannot be read is looked at closely."""
    try:
        image = ModuleImage.from_process(module, memory, None)
        return any(
            _OWNER in memory.read(module.load_bias + addr, size)
            for addr, size in image.facts.note_segments
        )
    except NotesError:
        raise
    except UnsupportedTarget:
        return False  # no ELF file of our kind
    except TargetFault:
        return True


def _key(key: StaticKey, declared: Declarations, image: ModuleImage) -> DeclaredKey:
    """Put a key and its branches together."""
    return DeclaredKey(
        key=key,
        branches=tuple(_branch(image, one) for one in declared.branches if one.key == key.addr),
    )


def _branch(image: ModuleImage, branch: KeyBranch) -> BranchSite:
    """Find out what a branch is in either state of its key."""
    entry = _entry(image, branch.addr, branch.size, opcode_size=_OPCODE_SIZE)
    forms = (_NOP, _JMP + encode_disp32(entry.end, branch.target))
    return BranchSite(entry=entry, forms=forms[::-1] if branch.is_inverted else forms)


def _calls(
    declared: Declarations, image: ModuleImage, *, is_file_known: bool
) -> tuple[DeclaredCall, ...]:
    """Put static calls and what calls them together."""
    if not declared.calls:
        return ()
    sites: dict[Addr, list[JournalEntry]] = {call.addr: [] for call in declared.calls}
    for site in find_call_sites(image, declared):
        if (site.insn.end - _DISP_SIZE) % _PAGE_SIZE <= _PAGE_SIZE - _DISP_SIZE:
            sites[site.call].append(_entry(image, site.insn.addr, site.insn.size))
    return tuple(
        _call(
            image,
            call,
            () if call.is_out_of_line else tuple(sites[call.addr]),
            _targets_of(call, declared.targets),
            is_file_known=is_file_known,
        )
        for call in declared.calls
    )


def _call(
    image: ModuleImage,
    call: StaticCall,
    sites: tuple[JournalEntry, ...],
    targets: tuple[CallTarget, ...],
    *,
    is_file_known: bool,
) -> DeclaredCall:
    """Put a static call together."""
    trampoline = _entry(image, call.addr, _TRAMPOLINE_SIZE)
    disp = int.from_bytes(trampoline.disp, "little", signed=True)
    default_addr = Addr(trampoline.end + disp)
    ends = [site.end for site in (trampoline, *sites)]
    return DeclaredCall(
        call=call,
        trampoline=trampoline,
        sites=sites,
        default_name=_default_name(image, call, default_addr),
        default_addr=default_addr,
        span=(min(ends), max(ends)),
        targets=targets,
        is_file_known=is_file_known,
    )


def _default_name(image: ModuleImage, call: StaticCall, addr: Addr) -> str:
    """Name what a static call calls at first."""
    named = image.symbols.name_at(addr)
    if named is None or named[0].startswith("optpoline."):
        try:
            code = image.read(addr, len(_RETURNS_ZERO))
        except TargetFault:
            code = b""
        if code.startswith(_RETURNS_NOTHING):
            return "NULL"
        if code == _RETURNS_ZERO:
            return "0"
    return call.type or "?"


def _targets_of(call: StaticCall, targets: Sequence[CallTarget]) -> tuple[CallTarget, ...]:
    """Return what a static call may be given."""
    return tuple(target for target in targets if target.call == call.addr)


def _entry(image: ModuleImage, addr: Addr, size: int, *, opcode_size: int = 0) -> JournalEntry:
    """Return the entry of an instruction that ends with a displacement, as in the file."""
    return JournalEntry(
        addr=addr,
        code=image.read(addr, size),
        disp_off=size - _DISP_SIZE,
        opcode_size=opcode_size,
    )
