# SPDX-License-Identifier: Apache-2.0
"""What the declared keys and static calls of a program are set to, read from its memory.

Nothing else is asked: the text and the counts of the keys are the state. Nothing is
stopped, so a look in the middle of a transaction may see both sides of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from optpoline.controller.declared_sites import DeclaredCall, DeclaredKey, DeclaredModule
from optpoline.controller.summary import KeyState, KeySummary, StaticCallSummary
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import Text, is_same_but_disp, read_whole

__all__ = ["SymbolAt", "destination", "summarise_calls", "summarise_keys"]

SymbolAt = Callable[[int], str | None]
"""Names code anywhere in the program."""

_Thing = TypeVar("_Thing", DeclaredKey, DeclaredCall)


def destination(entry: JournalEntry, code: bytes) -> Addr | None:
    """Return where an instruction found at a static call's site leads; None if nowhere of ours."""
    if not is_same_but_disp(entry, code):
        return None
    disp = int.from_bytes(code[entry.disp_off : entry.disp_off + 4], "little", signed=True)
    return Addr(entry.end + disp)


def summarise_keys(modules: Sequence[DeclaredModule], text: Text) -> tuple[KeySummary, ...]:
    """Return the state of every key, by name.

    Raises:
        TargetFault: if a module's data cannot be read: it was unloaded meanwhile.
    """
    return tuple(
        _key(name, parts, text)
        for name, parts in _by_name(modules, lambda one: ((k.key.name, k) for k in one.keys))
    )


def _key(name: str, parts: Sequence[tuple[DeclaredModule, DeclaredKey]], text: Text) -> KeySummary:
    """Summarise one key."""
    counts = [_count(key, text) for _, key in parts]
    states = [_key_state(key, bool(n), text) for (_, key), n in zip(parts, counts, strict=True)]
    first = parts[0][1].key
    return KeySummary(
        name=name,
        state=states[0] if len(set(states)) == 1 else KeyState.MIXED,
        begins_on=first.is_on,
        count=max(counts),
        n_branches=sum(len(key.branches) for _, key in parts),
        is_torn=KeyState.MIXED in states,
        modules=tuple(module.image.module.path for module, _ in parts),
        file=first.place.file or None,
        line=first.place.line or None,
    )


def _count(key: DeclaredKey, text: Text) -> int:
    """Read how often a key is enabled."""
    entry = key.count_entry()
    return int.from_bytes(text.read(entry.addr, len(entry.code)), "little")


def _key_state(key: DeclaredKey, is_on: bool, text: Text) -> KeyState:
    """Compare a key's branches with its count."""
    found = read_whole(text, [branch.entry for branch in key.branches])
    for branch in key.branches:
        if branch.entry.changed_of(found[branch.entry.addr]) != branch.forms[is_on]:
            return KeyState.MIXED
    return KeyState.ON if is_on else KeyState.OFF


def summarise_calls(
    modules: Sequence[DeclaredModule], text: Text, symbol_at: SymbolAt
) -> tuple[StaticCallSummary, ...]:
    """Return the state of every static call, by name.

    Raises:
        TargetFault: likewise.
    """
    return tuple(
        _call(name, parts, text, symbol_at)
        for name, parts in _by_name(modules, lambda one: ((c.call.name, c) for c in one.calls))
    )


def _call(
    name: str,
    parts: Sequence[tuple[DeclaredModule, DeclaredCall]],
    text: Text,
    symbol_at: SymbolAt,
) -> StaticCallSummary:
    """Summarise one static call."""
    first = parts[0][1]
    targets = {first.default_name: None} | {
        target.name: None for _, call in parts for target in call.targets
    }
    names: set[str | None] = set()
    is_set = is_torn = False
    for _, call in parts:
        found = read_whole(text, [call.trampoline, *call.sites])
        addr = destination(call.trampoline, found[call.trampoline.addr])
        leads = {destination(site, found[site.addr]) for site in call.sites}
        is_part_torn = addr is None or bool(leads - {addr, call.trampoline.addr})
        is_torn |= is_part_torn
        is_set |= any(found[one.addr] != one.code for one in (call.trampoline, *call.sites))
        known = None if addr is None or is_part_torn else call.name_of(addr)
        names.add(
            known
            if known is not None or addr is None or is_part_torn
            else symbol_at(addr) or hex(addr)
        )
    return StaticCallSummary(
        name=name,
        target=names.pop() if len(names) == 1 else None,
        default=first.default_name,
        targets=tuple(targets),
        is_out_of_line=first.call.is_out_of_line,
        n_calls=sum(len(call.sites) for _, call in parts),
        is_set=is_set,
        is_torn=is_torn,
        modules=tuple(module.image.module.path for module, _ in parts),
        file=first.call.place.file or None,
        line=first.call.place.line or None,
    )


def _by_name(
    modules: Sequence[DeclaredModule],
    named: Callable[[DeclaredModule], Iterable[tuple[str, _Thing]]],
) -> list[tuple[str, list[tuple[DeclaredModule, _Thing]]]]:
    """Put together what has one name, in whatever module; by name."""
    things: dict[str, list[tuple[DeclaredModule, _Thing]]] = {}
    for module in modules:
        for name, thing in named(module):
            things.setdefault(name, []).append((module, thing))
    return sorted(things.items())
