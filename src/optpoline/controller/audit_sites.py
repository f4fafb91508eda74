# SPDX-License-Identifier: Apache-2.0
"""Judge the program's text: journalled sites, and all that lies outside them.

A site may hold its baseline, or its baseline with a displacement that leads to a live
block made for it (a plain site: a direct branch there). Nothing else is ever written by a
controller, so a site with another opcode is somebody else's; one whose bytes are those of
the file that is mapped there now belongs to a module that is gone.

Text outside sites is compared with the module's file. Branches on static keys, and static
calls, are sites as well, as long as they have a form that they can have.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from optpoline.controller.audit_arenas import ArenaJudge
from optpoline.controller.audit_report import Fault, FaultKind, ForeignChange, ForeignKind
from optpoline.controller.audit_scene import ArenaContents, CodeMap, Finding
from optpoline.controller.declared_sites import DeclaredModule
from optpoline.controller.declared_state import destination
from optpoline.controller.module_files import ModuleFile
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import is_same_but_disp, read_entries
from optpoline.process.memory import RemoteMemory

__all__ = ["SiteTally", "find_known_sites", "judge_sites", "judge_text"]

_CHUNK_SIZE = 4 << 20
_MAX_GAP_SIZE = 8
"""Differences closer than this are one change."""
_INT3 = 0xCC


@dataclass(slots=True)
class SiteTally:
    """What became of the journalled sites.

    Attributes:
        patched: How many lead to a live block.
        baseline: How many hold their baseline.
        gone: How many are in a module that was unloaded or replaced.
        findings: What is odd about the others.
    """

    patched: int = 0
    baseline: int = 0
    gone: int = 0
    findings: list[Finding] = field(default_factory=list)


def judge_sites(
    memory: RemoteMemory,
    arenas: Sequence[ArenaContents],
    judge: ArenaJudge,
    code_map: CodeMap,
    files: Sequence[ModuleFile],
) -> SiteTally:
    """Look at each site of all journals."""
    by_addr: dict[Addr, list[JournalEntry]] = {}
    for contents in arenas:
        for entry in contents.arena.entries:
            by_addr.setdefault(entry.addr, []).append(entry)
    tally = SiteTally()
    odd: list[tuple[JournalEntry, bytes]] = []
    found = read_entries(memory, [entries[-1] for entries in by_addr.values()])
    for addr, entries in by_addr.items():
        code = found[addr]
        if any(code == entry.code for entry in entries):
            tally.baseline += 1
            continue
        own = next((entry for entry in entries if is_same_but_disp(entry, code)), None)
        if own is not None and judge.is_block_of(_destination(own, code), addr):
            tally.patched += 1
            tally.findings += _judge_thunk(own, judge)
        elif not code or not code_map.is_code(addr) or _is_of_file(addr, code, files):
            tally.gone += 1
        else:
            odd.append((own or entries[-1], code))
    tally.findings += _judge_odd_sites(memory, odd, judge, code_map, files)
    return tally


def _destination(entry: JournalEntry, code: bytes) -> int:
    """Return where a site's displacement leads."""
    disp = code[entry.disp_off : entry.disp_off + 4]
    return entry.end + int.from_bytes(disp, "little", signed=True)


def _judge_thunk(entry: JournalEntry, judge: ArenaJudge) -> Iterator[Finding]:
    """Check that a patched site's thunk can still be executed."""
    if not judge.has_thunk(entry):
        thunk = _destination(entry, entry.code)
        where = "" if entry.opcode_size else f" at {thunk:#x}"
        sentence = f"the thunk{where} of the site at {entry.addr:#x} is no code any more"
        yield Finding(Fault(kind=FaultKind.SITE, address=entry.addr, sentence=sentence))


def _is_of_file(addr: int, code: bytes, files: Sequence[ModuleFile]) -> bool:
    """Tell whether bytes are those that the file mapped there has."""
    return any(file.read(addr, len(code)) == code for file in files)


def _judge_odd_sites(
    memory: RemoteMemory,
    odd: Sequence[tuple[JournalEntry, bytes]],
    judge: ArenaJudge,
    code_map: CodeMap,
    files: Sequence[ModuleFile],
) -> Iterator[Finding]:
    """Judge the sites that were found odd, but for those that were being linked."""
    if not odd:
        return
    judge.read_tables_again()
    again = read_entries(memory, [entry for entry, _ in odd])
    for entry, code in odd:
        is_linked = is_same_but_disp(entry, code) and judge.is_block_of(
            _destination(entry, code), entry.addr
        )
        if not is_linked and again[entry.addr] == code:
            yield from _judge_odd(entry, code, judge, code_map, files)


def _judge_odd(
    entry: JournalEntry,
    code: bytes,
    judge: ArenaJudge,
    code_map: CodeMap,
    files: Sequence[ModuleFile],
) -> Iterator[Finding]:
    """Judge a site that holds neither its baseline nor a branch to a live block of its own."""
    dst = _destination(entry, code)
    name = f"the site at {entry.addr:#x}"
    if is_same_but_disp(entry, code):
        place = "no live block of it begins" if code_map.is_arena(dst) else "no block is"
        sentence = f"{name} leads to {dst:#x}, where {place}"
        yield Finding(Fault(kind=FaultKind.SITE, address=entry.addr, sentence=sentence), code)
        return
    if code_map.is_arena(dst) and not judge.is_block_of(dst, entry.addr):
        sentence = f"{name} leads, below another patcher's bytes, to {dst:#x}, no live block of it"
        yield Finding(Fault(kind=FaultKind.SITE, address=entry.addr, sentence=sentence), code)
    module = next((file.path for file in files if file.has(entry.addr)), "")
    yield Finding(
        ForeignChange(
            kind=ForeignKind.SITE, address=entry.addr, size=len(entry.code), module=module
        ),
        code,
    )


# --- static keys and calls


def find_known_sites(
    module: DeclaredModule, memory: RemoteMemory, code_map: CodeMap
) -> Iterator[JournalEntry]:
    """Yield the sites of keys and static calls that have one of their forms.

    Raises:
        TargetFault: if the module was unloaded meanwhile.
    """
    for key in module.keys:
        found = read_entries(memory, [branch.entry for branch in key.branches])
        for branch in key.branches:
            code = found[branch.entry.addr]
            changed = branch.entry.changed_of(code)
            if changed in branch.forms and branch.entry.with_changed(changed) == code:
                yield branch.entry
    for call in module.calls:
        found = read_entries(memory, [call.trampoline, *call.sites])
        for entry in (call.trampoline, *call.sites):
            addr = destination(entry, found[entry.addr])
            if addr is not None and code_map.is_code(addr):
                yield entry


# --- outside sites


def judge_text(
    memory: RemoteMemory,
    file: ModuleFile,
    entries: Iterable[JournalEntry],
    code_map: CodeMap,
) -> Iterator[Finding]:
    """Compare a module's executable segments with its file, journalled sites left out.

    Raises:
        TargetFault: if the module was unmapped meanwhile.
    """
    sites = [(int(entry.addr), int(entry.end)) for entry in entries]
    for start, data in file.segments:
        for off in range(0, len(data), _CHUNK_SIZE):
            expected = data[off : off + _CHUNK_SIZE]
            found = memory.read(start + off, len(expected))
            if found == expected:
                continue
            for first, last in _find_changes(start + off, expected, found, sites):
                yield _classify(memory, first, last, file, code_map)


def _find_changes(
    start: int, expected: bytes, found: bytes, sites: Sequence[tuple[int, int]]
) -> Iterator[tuple[int, int]]:
    """Yield (first, last) address of each run of differences outside sites."""
    is_changed: NDArray[np.bool_] = np.frombuffer(expected, np.uint8) != np.frombuffer(
        found, np.uint8
    )
    for first, end in sites:
        low, high = max(first - start, 0), min(end - start, len(expected))
        if low < high:
            is_changed[low:high] = False
    run: tuple[int, int] | None = None
    for off in np.flatnonzero(is_changed).tolist():
        if run is not None and off - run[1] < _MAX_GAP_SIZE:
            run = (run[0], off)
            continue
        if run is not None:
            yield start + run[0], start + run[1]
        run = (off, off)
    if run is not None:
        yield start + run[0], start + run[1]


def _classify(
    memory: RemoteMemory, first: int, last: int, file: ModuleFile, code_map: CodeMap
) -> Finding:
    """Say whose a change of the text is."""
    code = memory.read(first, last - first + 1)
    if _leads_into_arena(memory, first, last, code_map):
        sentence = f"text at {first:#x} leads into an arena, and no journal tells of it"
        return Finding(Fault(kind=FaultKind.TEXT, address=first, sentence=sentence), code)
    if len(code) == 1 and code[0] == _INT3:
        kind = ForeignKind.INT3
    else:
        kind = ForeignKind.RELOCATION if file.has_text_relocations else ForeignKind.OTHER
    return Finding(ForeignChange(kind=kind, address=first, size=len(code), module=file.path), code)


def _leads_into_arena(memory: RemoteMemory, first: int, last: int, code_map: CodeMap) -> bool:
    """Tell whether changed bytes are the displacement of a branch into an arena."""
    low = first - 5
    try:
        around = memory.read(low, last + 4 - low)
    except TargetFault:
        return False
    for off in range(2, len(around) - 3):
        # e8 call, e9 jmp; 0f 80..8f jcc
        is_near = around[off - 1] & 0xFE == 0xE8
        is_cond = around[off - 2] == 0x0F and around[off - 1] & 0xF0 == 0x80
        disp = int.from_bytes(around[off : off + 4], "little", signed=True)
        if (is_near or is_cond) and code_map.is_arena(low + off + 4 + disp):
            return True
    return False
