# SPDX-License-Identifier: Apache-2.0
"""Changes of keys and static calls, and the stores that make them.

A plan is made of what memory holds now, and says for each store what must be there
before: whoever changes the same thing in between makes the plan void, and a new one is
made. Stores are in the order that is safest should we be killed between two of them:
first counts and trampolines, which are the word on what state a thing is in, then
branches and calls. What was half done then can be told, and finished, by anybody.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from optpoline.controller.declared_sites import DeclaredCall, DeclaredKey, DeclaredModule
from optpoline.controller.declared_state import destination
from optpoline.errors import SiteChanged, UnsupportedTarget, UsageError
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import Poke, Text, read_whole
from optpoline.x86.assembler import encode_disp32

__all__ = ["CallChange", "Change", "KeyAction", "KeyChange", "plan_changes"]

_COUNT_SIZE = 4
_MAX_COUNT = (1 << 31) - 1
"""As the kernel's counts, which are signed."""


class KeyAction(Enum):
    """What is done to a key."""

    ENABLE = "enable"
    """Its count becomes 1 if it was 0."""
    DISABLE = "disable"
    """Its count becomes 0, whatever it was."""
    INCREMENT = "increment"
    DECREMENT = "decrement"
    RESET = "reset"
    """As it begins."""
    FINISH = "finish"
    """Its branches become what its count says."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyChange:
    """What a key shall become, in every module that has it."""

    name: str
    action: KeyAction


@dataclass(frozen=True, slots=True, kw_only=True)
class CallChange:
    """What a static call shall call, in every module that has it.

    Attributes:
        name: What it is called.
        addrs: For each trampoline where it shall lead; None for what it led to at first.
            Where a trampoline is missing, its calls become what it says.
    """

    name: str
    addrs: tuple[tuple[Addr, Addr | None], ...]


Change = KeyChange | CallChange


def plan_changes(
    modules: Sequence[DeclaredModule], changes: Sequence[Change], text: Text
) -> tuple[Poke, ...]:
    """Return the stores that make changes, in their order; none if all is so already.

    Args:
        modules: The program's modules that declare anything.
        changes: One after the other; the last one about a thing counts, but for counts.
        text: The program's memory.

    Raises:
        UsageError: if a key is to be decremented that is not enabled, or so often incremented
            that it cannot be counted.
        UnsupportedTarget: if the calls of a static call cannot be found.
        EncodeRangeError: if a call does not reach where it shall lead.
        SiteChanged: if a site has neither of its forms: somebody else's bytes are there.
        TargetFault: if a site cannot be read.
    """
    actions: dict[str, list[KeyAction]] = {}
    leads: dict[str, dict[Addr, Addr | None]] = {}
    for change in changes:
        if isinstance(change, KeyChange):
            actions.setdefault(change.name, []).append(change.action)
        else:
            leads[change.name] = dict(change.addrs)
    keys = [key for module in modules for key in module.keys if key.key.name in actions]
    calls = [call for module in modules for call in module.calls if call.call.name in leads]
    found = read_whole(text, [*_entries_of(keys, calls)])
    first: list[Poke] = []
    then: list[Poke] = []
    for key in keys:
        count, branches = _plan_key(key, actions[key.key.name], found)
        first.append(count)
        then += branches
    for call in calls:
        trampoline, sites = _plan_call(call, leads[call.call.name], found)
        first.append(trampoline)
        then += sites
    return tuple(poke for poke in (*first, *then) if poke.expected != poke.new)


def _entries_of(
    keys: Sequence[DeclaredKey], calls: Sequence[DeclaredCall]
) -> Iterator[JournalEntry]:
    """Yield all that is looked at."""
    for key in keys:
        yield key.count_entry()
        yield from (branch.entry for branch in key.branches)
    for call in calls:
        yield call.trampoline
        yield from call.sites


# --- keys


def _plan_key(
    key: DeclaredKey, actions: Sequence[KeyAction], found: dict[Addr, bytes]
) -> tuple[Poke, list[Poke]]:
    """Return the store to a key's count, and those to its branches."""
    entry = key.count_entry()
    now = found[entry.addr]
    count = int.from_bytes(now, "little")
    for action in actions:
        count = _counted(key, count, action)
    new = count.to_bytes(_COUNT_SIZE, "little")
    branches: list[Poke] = []
    for branch in key.branches:
        held = branch.entry.changed_of(found[branch.entry.addr])
        whole = branch.entry.with_changed(held)
        if held not in branch.forms or found[branch.entry.addr] != whole:
            expected = branch.entry.with_changed(branch.forms[count > 0])
            owner = f"a branch on the static key {key.key.name}"
            raise SiteChanged(branch.entry.addr, expected, found[branch.entry.addr], owner=owner)
        branches.append(Poke(entry=branch.entry, expected=held, new=branch.forms[count > 0]))
    return Poke(entry=entry, expected=now, new=new), branches


def _counted(key: DeclaredKey, count: int, action: KeyAction) -> int:
    """Return a key's count after something was done to it."""
    match action:
        case KeyAction.ENABLE:
            return count or 1
        case KeyAction.DISABLE:
            return 0
        case KeyAction.INCREMENT:
            if count >= _MAX_COUNT:
                raise UsageError(f"the static key {key.key.name} is enabled {count} times already")
            return count + 1
        case KeyAction.DECREMENT:
            if not count:
                raise UsageError(f"the static key {key.key.name} is not enabled")
            return count - 1
        case KeyAction.RESET:
            return int(key.key.is_on)
        case KeyAction.FINISH:
            return count
        case _:
            assert_never(action)


# --- static calls


def _plan_call(
    call: DeclaredCall, leads: dict[Addr, Addr | None], found: dict[Addr, bytes]
) -> tuple[Poke, list[Poke]]:
    """Return the store to a trampoline, and those to its calls."""
    if not call.may_be_changed:
        raise UnsupportedTarget(
            f"the calls of the static call {call.call.name} cannot be found, because the file of "
            "its module cannot be read",
            hint="be root, or define it with OPTPOLINE_OUT_OF_LINE",
        )
    owner = f"the static call {call.call.name}"
    entries = (call.trampoline, *call.sites)
    held = {one.addr: _held(one, found[one.addr], owner) for one in entries}
    if call.trampoline.addr in leads:
        addr = leads[call.trampoline.addr]
    else:
        addr = destination(call.trampoline, found[call.trampoline.addr])
        if addr == call.default_addr:
            addr = None
    pokes = [
        Poke(
            entry=one,
            expected=held[one.addr],
            new=one.disp if addr is None else encode_disp32(one.end, addr),
        )
        for one in entries
    ]
    return pokes[0], pokes[1:]


def _held(entry: JournalEntry, code: bytes, owner: str) -> bytes:
    """Return the displacement that a site holds.

    Raises:
        SiteChanged: if it is no branch of ours any more.
    """
    held = entry.changed_of(code)
    if entry.with_changed(held) != code:
        raise SiteChanged(entry.addr, entry.code, code, owner=owner)
    return held
