# SPDX-License-Identifier: Apache-2.0
"""Verify a patched process from outside, while it runs: nothing is stopped or written.

The process, and a controller that works on it, go on meanwhile: a block may be freed
and its memory used again between two reads. The rule that tells a fault from a race:

1. A block is read between two reads of its entry in the block table, one right after
   the other; what was read of a block whose entry changed in between is dropped. Where
   a site or a head leads to no block, the table is read again, then the site or head:
   it counts only if that is as before and the block was in no reading.
2. After a look that found something, the process is looked at again ``LOOK_EVERY_S``
   later. A finding is real if two looks one after the other saw it, about the same
   entry with the same bytes; one that only one look saw was a race.
3. That ends when a look sees nothing that the one before did not, or after ``MAX_LOOKS``.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

from optpoline.controller.arguments import validate_pid
from optpoline.controller.audit_arenas import ArenaJudge, judge_rights
from optpoline.controller.audit_report import (
    AuditReport,
    Fault,
    FaultKind,
    ForeignChange,
    ForeignKind,
)
from optpoline.controller.audit_scene import ArenaContents, CodeMap, Finding, read_contents
from optpoline.controller.audit_sites import (
    SiteTally,
    find_known_sites,
    judge_sites,
    judge_text,
)
from optpoline.controller.declared_settings import (
    describe_settings,
    describe_torn,
    read_declared_modules,
)
from optpoline.controller.left_arenas import (
    LeftArena,
    find_arena_files,
    find_arenas,
    is_controller_alive,
)
from optpoline.controller.module_files import ModuleFile, read_module_file
from optpoline.errors import TargetFault
from optpoline.model import Mapping, Module
from optpoline.patch.layout import ARENA_NAME, BlockState, JournalEntry
from optpoline.patch.text import read_entries
from optpoline.process.memory import RemoteMemory
from optpoline.process.modules import list_modules
from optpoline.process.permissions import open_program
from optpoline.process.procfs import read_maps

__all__ = ["audit"]

LOOK_EVERY_S = 0.02
"""Between two looks: longer than a controller takes to write or free a block, unless it
is kept from running for so long twice."""

MAX_LOOKS = 6


@dataclass(slots=True)
class _Look:
    """What one look saw."""

    arenas: list[LeftArena]
    contents: list[ArenaContents]
    sites: SiteTally
    findings: list[Finding]
    notes: list[str]
    n_modules: int
    settings: tuple[str, ...] = ()


def audit(pid: int) -> AuditReport:
    """Verify what controllers did to a process; see the module for how races are told.

    Target state: running. Its memory and the files it has mapped are read.

    Raises:
        UsageError: if ``pid`` is no whole number from 1 up.
        ProcessGone: if there is no such process, or it is a zombie.
        UnsupportedTarget: if it has no program of our kind: a kernel thread, for one.
        PermissionDenied: if its memory may not be read.
    """
    with open_program(validate_pid(pid)) as memory:
        look = _look(memory)
        found = set(look.findings)
        real: set[Finding] = set()
        for _ in range(MAX_LOOKS - 1):
            if not found - real:
                break
            time.sleep(LOOK_EVERY_S)
            look = _look(memory)
            again = set(look.findings)
            real, found = found & again, again
    return _report(pid, look, real)


def _report(pid: int, look: _Look, real: set[Finding]) -> AuditReport:
    """Return what the last look saw, with the findings that are real."""
    headers = [arena.header for arena in look.arenas if arena.header is not None]
    blocks = [
        slot.entry.state
        for contents in look.contents
        for slot in contents.after
        if slot.entry is not None
    ]
    faults = {one.what for one in real if isinstance(one.what, Fault)}
    foreign = {one.what for one in real if isinstance(one.what, ForeignChange)}
    return AuditReport(
        pid=pid,
        arenas=len(look.arenas),
        controller_pid=headers[0].controller_pid if headers else 0,
        controller_alive=any(is_controller_alive(header) for header in headers),
        promoted=look.sites.patched,
        baseline=look.sites.baseline,
        gone=look.sites.gone,
        blocks=len(blocks) - blocks.count(BlockState.RETIRED),
        retired=blocks.count(BlockState.RETIRED),
        modules=look.n_modules,
        faults=tuple(sorted(faults, key=lambda one: (one.address, one.sentence))),
        foreign_changes=tuple(sorted(foreign, key=lambda one: (one.address, one.kind.value))),
        notes=tuple(dict.fromkeys(look.notes)),
        settings=look.settings,
    )


def _look(memory: RemoteMemory) -> _Look:
    """Look at the process once."""
    pid = memory.pid
    maps = read_maps(pid)
    code_map = CodeMap(maps)
    look = _Look(
        arenas=find_arenas(memory, maps),
        contents=[],
        sites=SiteTally(),
        findings=[],
        notes=[],
        n_modules=0,
    )
    for arena in look.arenas:
        _read_arena(memory, arena, look)
    if find_arena_files(pid):
        look.notes.append("a descriptor of an arena is open in it, as while one is made")
    judge = ArenaJudge(memory, code_map, look.contents)
    for contents in look.contents:
        try:
            look.findings += judge.judge(contents)
        except TargetFault as fault:
            look.findings.append(_unreadable(contents.arena, fault))
    modules = [m for m in list_modules(pid, memory=memory) if not _is_arena(m)]
    files = _read_files(memory, modules, look)
    try:
        look.sites = judge_sites(memory, look.contents, judge, code_map, files)
    except TargetFault as fault:  # an arena that was let go meanwhile
        look.findings.append(_unreadable(look.arenas[0], fault))
    look.findings += look.sites.findings
    # Read again: sites may have been linked since.
    entries = [entry for arena in find_arenas(memory, read_maps(pid)) for entry in arena.entries]
    look.findings += _writable_code(modules, entries)
    entries += _look_at_settings(memory, modules, code_map, look)
    for file in files:
        try:
            look.findings += judge_text(memory, file, entries, code_map)
        except TargetFault:
            look.notes.append(f"{file.path} was unloaded meanwhile")
    look.notes += judge.remarks
    return look


def _look_at_settings(
    memory: RemoteMemory, modules: Sequence[Module], code_map: CodeMap, look: _Look
) -> list[JournalEntry]:
    """Look at static keys and calls; return the sites that are as they may be."""
    declaring, problems = read_declared_modules(memory, modules)
    look.notes += problems
    known: list[JournalEntry] = []
    for module in declaring:
        try:
            known += find_known_sites(module, memory, code_map)
            evidence = b"".join(read_entries(memory, list(module.entries())).values())
            for addr, sentence in describe_torn([module], memory):
                fault = Fault(kind=FaultKind.SETTING, address=addr, sentence=sentence)
                look.findings.append(Finding(fault, evidence))
            look.settings = (*look.settings, *describe_settings([module], memory))
        except TargetFault:
            look.notes.append(f"{module.image.module.path} was unloaded meanwhile")
    return known


def _read_arena(memory: RemoteMemory, arena: LeftArena, look: _Look) -> None:
    """Read an arena's contents, or find why not."""
    where = f"the arena at {arena.start:#x}"
    if arena.header is None:
        if arena.has_code:
            sentence = f"{where} is damaged, or of another version of optpoline"
            fault = Fault(kind=FaultKind.ARENA, address=arena.start, sentence=sentence)
            look.findings.append(Finding(fault))
        else:
            look.notes.append(f"{where} was never finished; nothing can lead there")
        return
    if not arena.has_code:
        if arena.history:
            look.findings += judge_rights(arena, arena.header)
        else:
            look.notes.append(f"{where} was never finished; nothing can lead there")
        return
    try:
        look.contents.append(read_contents(memory, arena, arena.header))
    except TargetFault as fault:
        look.findings.append(_unreadable(arena, fault))


def _unreadable(arena: LeftArena, fault: TargetFault) -> Finding:
    """Return the finding that an arena, or what its blocks name, cannot be read."""
    sentence = f"the arena at {arena.start:#x} cannot be read: {fault.message}"
    return Finding(Fault(kind=FaultKind.ARENA, address=arena.start, sentence=sentence))


def _is_arena(module: Module) -> bool:
    """Tell whether a module is an arena's memfd, which is no ELF file unless somebody made one."""
    return module.name.startswith(f"memfd:{ARENA_NAME}")


def _read_files(
    memory: RemoteMemory, modules: Sequence[Module], look: _Look
) -> tuple[ModuleFile, ...]:
    """Read the files of all modules; note those that cannot be had."""
    files: list[ModuleFile] = []
    for module in modules:
        file = read_module_file(memory.pid, module, memory)
        if file is None:
            look.notes.append(f"{module.path} cannot be read: its text was not compared")
        else:
            files.append(file)
    look.n_modules = len(files)
    return tuple(files)


def _writable_code(modules: Sequence[Module], entries: Sequence[JournalEntry]) -> list[Finding]:
    """Find code of modules with sites that the program can write."""
    found: list[Finding] = []
    for module in modules:
        if not any(module.start <= entry.addr < module.end for entry in entries):
            continue
        found += [
            Finding(_writable(module, mapping))
            for mapping in module.mappings
            if mapping.is_writable and mapping.is_executable
        ]
    return found


def _writable(module: Module, mapping: Mapping) -> ForeignChange:
    """Return the change of rights of one mapping."""
    return ForeignChange(
        kind=ForeignKind.RIGHTS, address=mapping.start, size=mapping.size, module=module.path
    )
