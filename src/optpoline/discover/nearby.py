# SPDX-License-Identifier: Apache-2.0
"""Find the instructions that the notes of calls are near.

A note of ``optpoline.h`` marks a point in the flow of instructions just before the
arguments of a call are put into place; only a compiler plugin knows the call itself. So
the header's marks are matched with calls:

* A static call's sites are all branches to its trampoline, also those without a mark (of
  code that the compiler copied). Each gets the place of the last mark before it.
* A dynamic call is the next indirect call, or branch to a thunk, in the function. Marks are
  a stack, because arguments may hold other dynamic calls: the call of the outer one
  comes last.

A branch that a plugin has marked may be a dynamic call of the header's too: then one site has
what both notes say. A wrong match is never harmful: it gives a call another's name, and how
many guards that one shall have; what must be left alone is known by the plugin's notes alone.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import numpy as np

from optpoline.discover.branches import decode_branches
from optpoline.discover.declarations import CallMark, Declarations, DynamicMark, Place
from optpoline.discover.declared import read_dynamic_marks
from optpoline.discover.image import ModuleImage
from optpoline.model import Addr
from optpoline.x86.decode import (
    Flow,
    Insn,
    decode_one,
    decode_range,
    is_redirectable,
    scan_branches,
)

__all__ = ["CallSite", "DynamicSite", "find_call_sites", "find_dynamic_sites", "read_marked_sites"]

_INDIRECT = (Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP)
_MAX_FUNCTION_SIZE = 1 << 16
"""Bytes looked at behind a mark where no function is known around it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CallSite:
    """A branch to a static call's trampoline.

    Attributes:
        insn: The branch.
        call: The trampoline.
        place: Where it is in the source; None if no mark comes before it.
    """

    insn: Insn
    call: Addr
    place: Place | None


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicSite:
    """A dynamic call and its instruction.

    Attributes:
        mark: What its note says.
        insn: The call, or None if none follows the mark in its function.
        is_via_thunk: Whether it is a direct branch to a thunk.
    """

    mark: DynamicMark
    insn: Insn | None
    is_via_thunk: bool


def find_call_sites(image: ModuleImage, declared: Declarations) -> tuple[CallSite, ...]:
    """Find all branches to the trampolines of a module's static calls, in address order.

    Raises:
        TargetFault: if the text cannot be read.
    """
    trampolines = np.array(sorted(call.addr for call in declared.calls), dtype=np.int64)
    marks: dict[Addr, list[CallMark]] = {}
    for mark in declared.call_marks:
        marks.setdefault(mark.call, []).append(mark)
    found: list[CallSite] = []
    for text in image.texts:
        ends = scan_branches(text.array, text.addr, trampolines)
        for insn in decode_branches(image, text, ends):
            if insn.target is None or not is_redirectable(text.code_at(insn.addr, insn.size)):
                continue
            place = _last_before(image, marks.get(insn.target, []), insn.addr)
            found.append(CallSite(insn=insn, call=insn.target, place=place))
    return tuple(found)


def _last_before(image: ModuleImage, marks: list[CallMark], addr: Addr) -> Place | None:
    """Return the place of the last mark before an address, in the same function."""
    index = bisect_right(marks, addr, key=lambda mark: mark.addr) - 1
    if index < 0:
        return None
    around = image.functions.find(addr)
    mark = marks[index]
    return mark.place if around is None or mark.addr in around else None


def find_dynamic_sites(image: ModuleImage, declared: Declarations) -> tuple[DynamicSite, ...]:
    """Find the instruction of each dynamic call, in the order of their marks.

    Raises:
        TargetFault: if the text cannot be read.
    """
    if not declared.dynamic:
        return ()
    thunks = frozenset(thunk.addr for thunk in image.thunks.thunks)
    found: list[DynamicSite] = []
    for group in _by_function(image, declared.dynamic):
        found += _match(image, group, thunks)
    return tuple(sorted(found, key=lambda site: site.mark.addr))


def _by_function(image: ModuleImage, marks: tuple[DynamicMark, ...]) -> Iterator[list[DynamicMark]]:
    """Yield the marks of each function together, in address order."""
    group: list[DynamicMark] = []
    for mark in marks:
        around = image.functions.find(mark.addr)
        if group and (around is None or group[0].addr not in around):
            yield group
            group = []
        group.append(mark)
    yield group


def _match(
    image: ModuleImage, marks: list[DynamicMark], thunks: frozenset[Addr]
) -> Iterator[DynamicSite]:
    """Yield the marks of one function with their instructions."""
    exact = {mark.addr: mark for mark in marks if not mark.is_near}
    near = [mark for mark in marks if mark.is_near]
    insns = _decode_from(image, near[0].addr) if near else _decode_each(image, exact)
    waiting = near[::-1]
    opened: list[DynamicMark] = []
    for insn in insns:
        while waiting and waiting[-1].addr <= insn.addr:
            opened.append(waiting.pop())
        is_via_thunk = insn.target in thunks
        if not is_via_thunk and insn.flow not in _INDIRECT:
            continue
        mark = _join(exact.pop(insn.addr, None), opened.pop() if opened else None)
        if mark is not None:
            yield DynamicSite(mark=mark, insn=insn, is_via_thunk=is_via_thunk)
        if not opened and not waiting:
            break
    for insn in _decode_each(image, exact):
        if insn.target in thunks or insn.flow in _INDIRECT:
            mark = exact.pop(insn.addr)
            yield DynamicSite(mark=mark, insn=insn, is_via_thunk=insn.target in thunks)
    for mark in (*opened, *waiting, *exact.values()):
        yield DynamicSite(mark=mark, insn=None, is_via_thunk=False)


def _decode_from(image: ModuleImage, start: Addr) -> Iterator[Insn]:
    """Yield the instructions of a function from one on."""
    around = image.functions.find(start)
    end = around.end if around is not None else start + _MAX_FUNCTION_SIZE
    text = image.text_at(start)
    return decode_range(text.code_at(start, end - start) if text else b"", start)


def _decode_each(image: ModuleImage, marks: Mapping[Addr, DynamicMark]) -> Iterator[Insn]:
    """Yield the instructions that marks say are sites."""
    for mark in tuple(marks.values()):
        text = image.text_at(mark.addr)
        insn = decode_one(text.code_at(mark.addr, mark.size), mark.addr) if text else None
        if insn is not None and insn.size == mark.size:
            yield insn


def _join(exact: DynamicMark | None, near: DynamicMark | None) -> DynamicMark | None:
    """Put together what a plugin and the header say of one branch."""
    if exact is None or near is None:
        return near or exact
    return replace(
        exact,
        table=near.table,
        type=near.type or exact.type,
        n_branches=near.n_branches or exact.n_branches,
    )


def read_marked_sites(image: ModuleImage) -> Mapping[Addr, DynamicSite]:
    """Return the branches of a module that its notes speak of, by their addresses.

    Raises:
        NotesError: if its notes are damaged, or too new.
        TargetFault: if the text cannot be read.
    """
    sites = find_dynamic_sites(image, Declarations(dynamic=read_dynamic_marks(image)))
    return {site.insn.addr: site for site in sites if site.insn is not None}
