# SPDX-License-Identifier: Apache-2.0
"""What stores a change of keys and static calls takes, and in which order."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller.changes import CallChange, Change, KeyAction, KeyChange, plan_changes
from optpoline.controller.declared_sites import (
    BranchSite,
    DeclaredCall,
    DeclaredKey,
    DeclaredModule,
)
from optpoline.controller.declared_state import summarise_calls, summarise_keys
from optpoline.controller.summary import KeyState
from optpoline.discover.declarations import Place, StaticCall, StaticKey
from optpoline.errors import SiteChanged, TargetFault, UnsupportedTarget, UsageError
from optpoline.model import Addr
from optpoline.patch.layout import JournalEntry
from optpoline.patch.text import Poke, poke_all
from optpoline.x86.assembler import encode_disp32

PLACE = Place(file="a.c", line=1)
NOP = bytes.fromhex("0f1f440000")
COUNT, BRANCHES = Addr(0x100), (Addr(0x40), Addr(0x50))
TRAMPOLINE, CALLS, FIRST, SECOND = Addr(0x80), (Addr(0x10), Addr(0x20)), Addr(0xC0), Addr(0xD0)


class FakeText:
    """A few bytes of memory."""

    def __init__(self) -> None:
        """Have nothing but zeros."""
        self.data = bytearray(0x200)

    def read(self, addr: int, size: int) -> bytes:
        """Read."""
        return bytes(self.data[addr : addr + size])

    def write(self, addr: int, data: bytes) -> None:
        """Write."""
        self.data[addr : addr + len(data)] = data


def branch(addr: Addr, *, is_inverted: bool) -> BranchSite:
    """Return a branch that jumps 16 bytes ahead, as it is while its key is disabled."""
    jump = b"\xe9" + (16).to_bytes(4, "little")
    forms = (jump, NOP) if is_inverted else (NOP, jump)
    entry = JournalEntry(addr=addr, code=forms[0], disp_off=1, opcode_size=1)
    return BranchSite(entry=entry, forms=forms)


def direct(addr: Addr, opcode: bytes, target: Addr) -> JournalEntry:
    """Return a direct branch."""
    code = opcode + encode_disp32(addr + 5, target)
    return JournalEntry(addr=addr, code=code, disp_off=1)


KEY = DeclaredKey(
    key=StaticKey(name="trace", addr=COUNT, is_on=False, place=PLACE),
    branches=(branch(BRANCHES[0], is_inverted=False), branch(BRANCHES[1], is_inverted=True)),
)
CALL = DeclaredCall(
    call=StaticCall(name="codec", addr=TRAMPOLINE, type="first", is_out_of_line=False, place=PLACE),
    trampoline=direct(TRAMPOLINE, b"\xe9", FIRST),
    sites=tuple(direct(addr, b"\xe8", TRAMPOLINE) for addr in CALLS),
    default_name="first",
    default_addr=FIRST,
    span=(Addr(0x15), Addr(0x85)),
    targets=(),
    is_file_known=True,
)
ENABLE = KeyChange(name="trace", action=KeyAction.ENABLE)
FINISH = KeyChange(name="trace", action=KeyAction.FINISH)
TO_SECOND = CallChange(name="codec", addrs=((TRAMPOLINE, SECOND),))
TO_FIRST = CallChange(name="codec", addrs=((TRAMPOLINE, FIRST),))
RESET = CallChange(name="codec", addrs=((TRAMPOLINE, None),))


@pytest.fixture
def text() -> FakeText:
    """Return the memory of a program that nobody has changed."""
    memory = FakeText()
    for entry in (*(one.entry for one in KEY.branches), CALL.trampoline, *CALL.sites):
        memory.write(entry.addr, entry.code)
    return memory


def module(key: DeclaredKey = KEY, call: DeclaredCall = CALL) -> DeclaredModule:
    """Return a module with one key and one static call."""
    image = cast("object", SimpleNamespace(module=SimpleNamespace(path="/bin/a")))
    made = SimpleNamespace(image=image, keys=(key,), calls=(call,), readers_offset=None)
    return cast(DeclaredModule, made)


def plan(text: FakeText, *changes: Change, call: DeclaredCall = CALL) -> tuple[Poke, ...]:
    """Plan changes of the module."""
    return plan_changes([module(call=call)], changes, text)


def addrs(pokes: tuple[Poke, ...]) -> list[int]:
    """Return where is stored, in order."""
    return [poke.entry.addr for poke in pokes]


def state(text: FakeText) -> tuple[KeyState, str | None]:
    """Return what the key and the call are set to."""
    (key,) = summarise_keys([module()], text)
    (call,) = summarise_calls([module()], text, hex)
    return key.state, call.target


def test_counts_and_trampolines_come_first(text: FakeText) -> None:
    pokes = plan(text, TO_SECOND, ENABLE)
    assert addrs(pokes) == [COUNT, TRAMPOLINE, *BRANCHES, *CALLS]
    poke_all(text, pokes)
    assert state(text) == (KeyState.ON, hex(SECOND))
    assert plan(text, TO_SECOND, ENABLE) == ()


def test_every_prefix_of_the_stores_can_be_finished(text: FakeText) -> None:
    before = bytes(text.data)
    pokes = plan(text, TO_SECOND, ENABLE)
    for n_done in range(len(pokes) + 1):
        text.data[:] = before
        poke_all(text, pokes[:n_done])
        poke_all(text, plan(text, FINISH, CallChange(name="codec", addrs=())))
        # What the first stores said is what holds.
        assert state(text) == (
            KeyState.ON if n_done >= 1 else KeyState.OFF,
            hex(SECOND) if n_done >= 2 else "first",
        )


def test_reset_is_what_the_file_has_and_an_update_skips_the_trampoline(text: FakeText) -> None:
    before = bytes(text.data)
    assert addrs(plan(text, TO_FIRST)) == [*CALLS]
    poke_all(text, plan(text, TO_FIRST))
    assert state(text)[1] == "first"
    poke_all(text, plan(text, RESET))
    assert bytes(text.data) == before


def test_the_last_change_of_a_call_counts_and_all_of_a_key(text: FakeText) -> None:
    up = KeyChange(name="trace", action=KeyAction.INCREMENT)
    pokes = plan(text, TO_SECOND, up, RESET, up)
    assert addrs(pokes) == [COUNT, *BRANCHES]
    assert pokes[0].new == (2).to_bytes(4, "little")


@pytest.mark.parametrize(
    ("count", "action", "expected"),
    [
        (0, KeyAction.ENABLE, 1),
        (3, KeyAction.ENABLE, 3),
        (3, KeyAction.DISABLE, 0),
        (3, KeyAction.RESET, 0),
        (3, KeyAction.INCREMENT, 4),
        (3, KeyAction.DECREMENT, 2),
        (3, KeyAction.FINISH, 3),
    ],
)
def test_counts(text: FakeText, count: int, action: KeyAction, expected: int) -> None:
    text.write(COUNT, count.to_bytes(4, "little"))
    poke_all(text, plan(text, KeyChange(name="trace", action=action)))
    assert int.from_bytes(text.read(COUNT, 4), "little") == expected
    assert state(text)[0] is (KeyState.ON if expected else KeyState.OFF)


@pytest.mark.parametrize(
    ("count", "action"), [(0, KeyAction.DECREMENT), ((1 << 31) - 1, KeyAction.INCREMENT)]
)
def test_counts_have_ends(text: FakeText, count: int, action: KeyAction) -> None:
    text.write(COUNT, count.to_bytes(4, "little"))
    with pytest.raises(UsageError, match="the static key trace is"):
        plan(text, KeyChange(name="trace", action=action))


@pytest.mark.parametrize("addr", [BRANCHES[0], TRAMPOLINE, CALLS[1]])
def test_bytes_of_others_are_an_error(text: FakeText, addr: Addr) -> None:
    text.write(addr, b"\xcc")
    with pytest.raises(SiteChanged) as caught:
        plan(text, ENABLE, TO_SECOND)
    assert caught.value.addr == addr


def test_calls_of_a_file_that_cannot_be_read_are_not_guessed(text: FakeText) -> None:
    with pytest.raises(UnsupportedTarget, match="codec cannot be found"):
        plan(text, TO_SECOND, call=replace(CALL, is_file_known=False))
    out_of_line = replace(CALL.call, is_out_of_line=True)
    call = replace(CALL, is_file_known=False, call=out_of_line, sites=())
    assert addrs(plan(text, TO_SECOND, call=call)) == [TRAMPOLINE]


@pytest.mark.parametrize("addr", [COUNT, BRANCHES[0], TRAMPOLINE, CALLS[1]])
def test_what_was_unloaded_is_nobodys_change(text: FakeText, addr: Addr) -> None:
    class Unloaded(FakeText):
        """Memory a part of which is gone."""

        def read(self, addr_: int, size: int) -> bytes:
            if addr_ <= addr < addr_ + size:
                raise TargetFault(addr_, size, "read")
            return super().read(addr_, size)

    gone = Unloaded()
    gone.data[:] = text.data
    with pytest.raises(TargetFault):
        plan(gone, TO_SECOND, ENABLE)
    with pytest.raises(TargetFault):
        state(gone)
