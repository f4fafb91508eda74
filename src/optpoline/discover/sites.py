# SPDX-License-Identifier: Apache-2.0
"""Find the sites of one module: retpolines, and plain branches that its source declares.

1. Find the thunks.
2. Look at every byte offset for a branch that would land on one: candidates.
3. Decode from the last known instruction boundary: a candidate is a site only
   if an instruction ends where it does.
4. Add the plain indirect branches that notes name and that have room for a direct one.
5. Say of each site whether, and why, it must not be promoted.

Not a site: what is inside a thunk or a PLT, ``thunk-inline`` code, and a call of
another module's thunk by way of the PLT; the last two are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from optpoline.discover.branches import decode_branches
from optpoline.discover.critical_sections import find_critical_sections
from optpoline.discover.flags import FlagsAnalysis
from optpoline.discover.image import ModuleImage
from optpoline.discover.nearby import DynamicSite, read_marked_sites
from optpoline.discover.relocations import read_relocations
from optpoline.discover.text import Text
from optpoline.errors import NotesError
from optpoline.model import (
    Addr,
    OperandLoad,
    Refusal,
    Site,
    SiteKind,
    Table,
    Thunk,
    ThunkFlavour,
)
from optpoline.x86.decode import (
    AddrArray,
    Flow,
    Insn,
    count_indirect_branches,
    is_redirectable,
    name_operand,
    plt_entries_before,
    scan_branches,
    scan_slot_jumps,
)
from optpoline.x86.plain_branches import (
    PlainBranch,
    decode_plain_branch,
    find_register,
)
from optpoline.x86.thunks import STACK_OPERAND, THUNK_NAME_MARKS

__all__ = ["SiteScan", "count_plain_indirect", "find_sites"]

_KINDS: dict[Flow, SiteKind] = {
    Flow.CALL: SiteKind.CALL,
    Flow.JUMP: SiteKind.JUMP,
    Flow.COND_JUMP: SiteKind.COND_JUMP,
    Flow.INDIRECT_CALL: SiteKind.CALL,
    Flow.INDIRECT_JUMP: SiteKind.JUMP,
}

_PAGE_SIZE = 4096
_DISP_SIZE = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteScan:
    """What was found in one module.

    Attributes:
        sites: In address order, refused ones included.
        thunks: In address order, those without a site included.
        n_inline: Number of ``thunk-inline`` bodies.
        n_via_plt: Number of branches to another module's thunk by way of the PLT.
        n_unverified: Number of candidates that are no instruction, or a form we do not know.
        n_plain_indirect: Number of plain indirect branches, or None if not counted.
    """

    sites: tuple[Site, ...]
    thunks: tuple[Thunk, ...]
    n_inline: int
    n_via_plt: int
    n_unverified: int
    n_plain_indirect: int | None = None


def find_sites(image: ModuleImage, *, count_plain: bool = False) -> SiteScan:
    """Find the sites of a module.

    Args:
        image: The module.
        count_plain: Whether to decode all text to count plain indirect branches as well.

    Returns:
        What was found; a module that has nothing gives empty tuples.

    Raises:
        TargetFault: if its text cannot be read.

    Target state: running, or all threads stopped. Nothing is written.
    """
    scan = image.thunks
    sites: list[Site] = []
    n_unverified = 0
    try:
        marked = read_marked_sites(image)
        default = None
    except NotesError:
        marked, default = {}, Refusal.DAMAGED_NOTES
    if scan.thunks or marked:
        finder = _SiteFinder(image, marked, default)
        for text in image.texts:
            sites += [*finder.find_in(text), *finder.find_plain(text)]
        sites.sort(key=lambda site: site.addr)
        n_unverified = finder.n_unverified
    n_via_plt = _count_via_plt(image)
    n_plain = count_plain_indirect(image) if count_plain else None
    if not sites:
        image.drop_text()
    return SiteScan(
        sites=tuple(sites),
        thunks=scan.thunks,
        n_inline=scan.n_inline,
        n_via_plt=n_via_plt,
        n_unverified=n_unverified,
        n_plain_indirect=n_plain,
    )


def count_plain_indirect(image: ModuleImage) -> int:
    """Count the indirect calls and jumps of a module that use no thunk, PLT left out."""
    n_found = 0
    for span in image.text_sections():
        text = image.text_at(span.start)
        if text is not None and not image.is_in_plt(span.start):
            code = text.code_at(span.start, span.end - span.start)
            n_found += count_indirect_branches(code, span.start)
    return n_found


def _count_via_plt(image: ModuleImage) -> int:
    """Count the branches that reach another module's thunk by way of the PLT."""
    imported = image.dynamic_symbols.undefined_containing(THUNK_NAME_MARKS)
    if not imported:
        return 0
    slots = read_relocations(image).slots_of(imported)
    jumps = [scan_slot_jumps(text.array, text.addr, slots) for text in image.texts]
    entries = plt_entries_before(np.concatenate(jumps))
    return sum(scan_branches(text.array, text.addr, entries).size for text in image.texts)


def _table_of(marked: DynamicSite | None) -> Table | None:
    """Return the table that a site is of by its note, or None."""
    if marked is None or marked.mark.table is None:
        return None
    return Table(name=marked.mark.table, type=marked.mark.type)


class _SiteFinder:
    """Finds the sites of one module, text by text."""

    def __init__(
        self, image: ModuleImage, marked: Mapping[Addr, DynamicSite], refusal: Refusal | None
    ) -> None:
        """Prepare what all its texts need; ``refusal`` is that of all its sites, if there is."""
        self._image = image
        self._thunks = {thunk.addr: thunk for thunk in image.thunks.thunks}
        self._flags = FlagsAnalysis(image)
        self._critical = find_critical_sections(image)
        self._marked = marked
        self._refused = refusal
        self.n_unverified = 0

    def find_in(self, text: Text) -> Iterator[Site]:
        """Yield the sites of one text in address order."""
        ends = scan_branches(text.array, text.addr, self._image.thunks.addrs)
        ends = ends[~self._is_excluded(ends - 1)]
        self.n_unverified += ends.size
        for insn in decode_branches(self._image, text, ends):
            thunk = self._find_thunk(insn, text)
            if thunk is not None:
                self.n_unverified -= 1
                yield self._site(insn, thunk, text)

    def find_plain(self, text: Text) -> Iterator[Site]:
        """Yield the plain sites of one text that notes tell of, in address order."""
        marked = {
            one.insn.end: one.insn
            for addr, one in self._marked.items()
            if one.insn is not None and addr in text and not one.is_via_thunk
        }
        branches = {
            end: branch
            for end, insn in marked.items()
            if (branch := self._plain_branch(insn, text)) is not None
        }
        self.n_unverified += len(branches)
        # A wrong note must not have us write into the middle of an instruction.
        for insn in decode_branches(self._image, text, np.array(sorted(branches), np.int64)):
            if insn.addr != marked[insn.end].addr:
                continue
            self.n_unverified -= 1
            plain, operand, load = branches[insn.end]
            thunk = Thunk(
                addr=Addr(0),
                operand=operand,
                flavour=ThunkFlavour.PLAIN,
                symbol=name_operand(text.code_at(insn.addr, insn.size), insn.addr),
            )
            site = self._site(insn, thunk, text, opcode_size=plain.opcode_size)
            yield replace(site, load=load)

    def _plain_branch(
        self, insn: Insn, text: Text
    ) -> tuple[PlainBranch, str, OperandLoad | None] | None:
        """Return a branch that can be a plain site, its operand and what loads that, or None."""
        branch = decode_plain_branch(text.code_at(insn.addr, insn.size))
        if branch is None:
            return None
        name = self._marked[insn.addr].mark.register
        operand = branch.find_operand(None if name is None else find_register(name), insn.end)
        return None if operand is None else (branch, *operand)

    def _is_excluded(self, addrs: AddrArray) -> NDArray[np.bool_]:
        """Say of each address whether it is in a thunk's own code, or in the PLT's."""
        spans = (*self._image.plt_spans(), *self._image.thunks.bodies)
        excluded = np.zeros(addrs.size, dtype=np.bool_)
        for span in spans:
            excluded |= (addrs >= span.start) & (addrs < span.end)
        return excluded

    def _find_thunk(self, insn: Insn, text: Text) -> Thunk | None:
        """Return the thunk an instruction branches to in a form we know, or None."""
        if insn.target is None or not is_redirectable(text.code_at(insn.addr, insn.size)):
            return None
        return self._thunks.get(insn.target)

    def _site(self, insn: Insn, thunk: Thunk, text: Text, *, opcode_size: int = 0) -> Site:
        """Describe one site, of whose opcode so many bytes change too."""
        off = insn.addr - text.addr
        code = text.baseline[off : off + insn.size]
        name = self._image.symbols.name_at(insn.addr)
        if name is not None:
            function_addr: Addr | None = Addr(insn.addr - name[1])
        else:
            span = self._image.functions.find(insn.addr)
            function_addr = span.start if span else None
        marked = self._marked.get(insn.addr)
        is_plain = thunk.flavour is ThunkFlavour.PLAIN
        if code != text.code_at(insn.addr, insn.size):
            refusal: Refusal | None = Refusal.FOREIGN_BYTES
        elif marked is not None and marked.mark.is_excluded:
            refusal = Refusal.EXCLUDED
        else:
            refusal = self._refusal(insn, thunk, opcode_size)
        return Site(
            addr=insn.addr,
            code=code,
            kind=_KINDS[insn.flow],
            disp_addr=Addr(insn.end - _DISP_SIZE),
            thunk=thunk,
            module=self._image.module.path,
            function=name[0] if name else None,
            function_addr=function_addr,
            refusal=refusal,
            max_guards=marked.mark.n_branches if marked is not None else 0,
            is_plain=is_plain,
            table=_table_of(marked),
        )

    def _refusal(self, insn: Insn, thunk: Thunk, opcode_size: int) -> Refusal | None:
        """Say why a site whose bytes are its own must not be promoted, or None."""
        if self._refused is not None:
            return self._refused
        if thunk.operand == STACK_OPERAND:
            return Refusal.UNKNOWN_OPERAND
        if any(insn.addr in span for span in self._critical):
            return Refusal.CRITICAL_SECTION
        changed_size = _DISP_SIZE + opcode_size
        if (insn.end - changed_size) % _PAGE_SIZE > _PAGE_SIZE - changed_size:
            return Refusal.PAGE_CROSSING
        if insn.flow in (Flow.CALL, Flow.INDIRECT_CALL):
            return None
        return self._flags.refusal_at(insn.addr)
