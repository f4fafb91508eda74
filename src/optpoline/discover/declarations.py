# SPDX-License-Identifier: Apache-2.0
"""What a module can declare, as frozen records: keys, static calls, dynamic calls.

Addresses are the program's. Nothing here reads anything.
"""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.model import Addr

__all__ = [
    "CallMark",
    "CallTarget",
    "Declarations",
    "DynamicMark",
    "KeyBranch",
    "Place",
    "StaticCall",
    "StaticKey",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Place:
    """Where something is in the source; the line is 0 where it is not known."""

    file: str
    line: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticKey:
    """A static key.

    Attributes:
        name: What it is called.
        addr: Its count, 8 bytes, how often it is enabled.
        is_on: Whether it begins enabled.
        place: Where it is defined.
    """

    name: str
    addr: Addr
    is_on: bool
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyBranch:
    """A branch on a static key: an instruction that falls through or jumps.

    Attributes:
        addr: Its first byte.
        size: Its size in bytes; the last five are what changes.
        key: The key.
        target: Where it jumps.
        is_inverted: Whether it jumps while the key is disabled, not while it is enabled.
        begins_as_jump: What it is in the file.
        place: Where it is in the source.
    """

    addr: Addr
    size: int
    key: Addr
    target: Addr
    is_inverted: bool
    begins_as_jump: bool
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCall:
    """A static call: a trampoline, which its calls branch to.

    Attributes:
        name: What it is called.
        addr: Its trampoline, a jump with a 32-bit displacement.
        type: A function of its type, as written in the source.
        is_out_of_line: Whether the trampoline is changed instead of the calls.
        place: Where it is defined.
    """

    name: str
    addr: Addr
    type: str | None
    is_out_of_line: bool
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class CallTarget:
    """A function that a static call may be given: the compiler has compared their types.

    Attributes:
        call: The trampoline.
        name: The function's name, as written in the source.
        addr: The function; that of its PLT entry where it is another module's.
        place: Where this is said.
    """

    call: Addr
    name: str
    addr: Addr
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class CallMark:
    """Near here is a call of a static call's trampoline: it tells the place in the source."""

    addr: Addr
    call: Addr
    place: Place


@dataclass(frozen=True, slots=True, kw_only=True)
class DynamicMark:
    """An indirect call of a table's, or any that a compiler plugin marked.

    Attributes:
        addr: The call, or where to look for it from.
        is_near: Whether it is the next one from there on.
        size: Its size in bytes, 0 if near.
        table: Name of the table, or None.
        type: Result and parameters, as written in the source, or None.
        n_branches: Branches at most, 0 for any.
        place: Where it is in the source.
        is_excluded: Whether its programmer wants it left as it is.
        register: One that is dead there and wherever it leads, as the compiler calls it, or None.
    """

    addr: Addr
    is_near: bool
    size: int
    table: str | None
    type: str | None
    n_branches: int
    place: Place
    is_excluded: bool = False
    register: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Declarations:
    """All that a module declares, each in address order.

    Attributes:
        keys: Its static keys.
        branches: The branches on them.
        calls: Its static calls.
        targets: What they may be given.
        call_marks: Where they are called, by the source.
        dynamic: Its dynamic calls.
        readers: The instruction that loads the offset of a thread's count of open brackets
            from its thread pointer, or None if the module brackets nothing.
    """

    keys: tuple[StaticKey, ...] = ()
    branches: tuple[KeyBranch, ...] = ()
    calls: tuple[StaticCall, ...] = ()
    targets: tuple[CallTarget, ...] = ()
    call_marks: tuple[CallMark, ...] = ()
    dynamic: tuple[DynamicMark, ...] = ()
    readers: Addr | None = None
