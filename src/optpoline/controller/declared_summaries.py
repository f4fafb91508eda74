# SPDX-License-Identifier: Apache-2.0
"""Say what the source of a module declares, for people and programs that only look at it."""

from __future__ import annotations

from collections.abc import Iterator

from optpoline.controller.summary import DeclaredKind, DeclaredSummary
from optpoline.discover import (
    Declarations,
    ModuleImage,
    find_call_sites,
    find_dynamic_sites,
    read_declarations,
)
from optpoline.discover.declarations import Place, StaticCall
from optpoline.discover.nearby import CallSite, DynamicSite
from optpoline.model import Refusal
from optpoline.x86.plain_branches import decode_plain_branch, find_register

__all__ = ["summarise_declared"]

_PAGE_SIZE = 4096
_DISP_SIZE = 4
_BRANCH_SIZE = 5
"""Bytes of the shortest instruction that can be made a direct branch."""


def summarise_declared(image: ModuleImage) -> tuple[DeclaredSummary, ...]:
    """Return what a module declares, in the order of addresses.

    Args:
        image: The module.

    Raises:
        NotesError: if its notes are damaged or contradict its text.
        TargetFault: if it cannot be read.
    """
    declared = read_declarations(image)
    maker = _Maker(image)
    found = [*_keys(declared, maker), *_calls(declared, image, maker)]
    found += [_dynamic(site, image, maker) for site in find_dynamic_sites(image, declared)]
    return tuple(sorted(found, key=lambda one: one.address))


class _Maker:
    """Makes the summaries of one module.

    Args:
        image: The module.
    """

    def __init__(self, image: ModuleImage) -> None:
        """Remember the module."""
        self._image = image

    def make(
        self,
        kind: DeclaredKind,
        address: int,
        place: Place | None,
        *,
        name: str | None,
        type: str | None = None,
        size: int = 0,
        begins_on: bool | None = None,
        problem: str | None = None,
    ) -> DeclaredSummary:
        """Add to a declaration what only the module knows."""
        module = self._image.module
        around = self._image.symbols.name_at(address) if size else None
        function = around and (f"{around[0]}+{around[1]:#x}" if around[1] else around[0])
        return DeclaredSummary(
            module=module.path,
            address=address,
            offset=address - module.load_bias,
            kind=kind,
            name=name,
            type=type,
            function=function,
            file=(place.file or None) if place else None,
            line=(place.line or None) if place else None,
            size=size,
            begins_on=begins_on,
            problem=problem,
        )


def _keys(declared: Declarations, maker: _Maker) -> Iterator[DeclaredSummary]:
    """Yield the keys and their branches."""
    names = {key.addr: key.name for key in declared.keys}
    for key in declared.keys:
        yield maker.make(DeclaredKind.KEY, key.addr, key.place, name=key.name, begins_on=key.is_on)
    for branch in declared.branches:
        yield maker.make(
            DeclaredKind.BRANCH,
            branch.addr,
            branch.place,
            name=names[branch.key],
            size=branch.size,
            begins_on=branch.begins_as_jump,
        )


def _calls(declared: Declarations, image: ModuleImage, maker: _Maker) -> Iterator[DeclaredSummary]:
    """Yield the static calls, what calls them, and what they may be given."""
    calls = {call.addr: call for call in declared.calls}
    for call in declared.calls:
        yield maker.make(
            DeclaredKind.STATIC_CALL,
            call.addr,
            call.place,
            name=call.name,
            type=call.type,
            size=_BRANCH_SIZE,
        )
    for target in declared.targets:
        yield maker.make(
            DeclaredKind.TARGET,
            target.addr,
            target.place,
            name=calls[target.call].name,
            type=target.name,
        )
    for site in find_call_sites(image, declared):
        yield maker.make(
            DeclaredKind.CALL,
            site.insn.addr,
            site.place,
            name=calls[site.call].name,
            size=site.insn.size,
            problem=_call_problem(site, calls[site.call]),
        )


def _call_problem(site: CallSite, call: StaticCall) -> str | None:
    """Say why a call of a trampoline is not changed itself, or None if it is."""
    if call.is_out_of_line:
        return "only its trampoline is changed"
    if (site.insn.end - _DISP_SIZE) % _PAGE_SIZE > _PAGE_SIZE - _DISP_SIZE:
        return f"{Refusal.PAGE_CROSSING.value}, so only its trampoline is changed"
    return None


def _dynamic(site: DynamicSite, image: ModuleImage, maker: _Maker) -> DeclaredSummary:
    """Summarise a dynamic call."""
    mark, insn = site.mark, site.insn
    return maker.make(
        DeclaredKind.DYNAMIC_CALL,
        mark.addr if insn is None else insn.addr,
        mark.place,
        name=mark.table,
        type=mark.type,
        size=0 if insn is None else insn.size,
        problem=_dynamic_problem(site, image),
    )


def _dynamic_problem(site: DynamicSite, image: ModuleImage) -> str | None:
    """Say why a dynamic call cannot be changed, or None if it can."""
    if site.insn is None:
        return "no indirect call follows its note"
    if site.mark.is_excluded:
        return Refusal.EXCLUDED.value
    if site.is_via_thunk:
        return None
    if site.insn.size < _BRANCH_SIZE:
        return "its instruction is too short: build with retpolines or with the plugin"
    text = image.text_at(site.insn.addr)
    code = text.code_at(site.insn.addr, site.insn.size) if text is not None else b""
    branch = decode_plain_branch(code)
    if branch is None:
        return "its instruction has no room for another form: build with the plugin"
    register = None if site.mark.register is None else find_register(site.mark.register)
    if branch.find_operand(register, site.insn.end) is None:
        return "its target is in memory, and no register is known to be free there"
    return None
