# SPDX-License-Identifier: Apache-2.0
"""What is known about registers and flags before an instruction of a block.

A register holds one of these *values*; where ways meet, what both have in common::

    Entry      what it held when the block was entered, maybe less a literal
    Constant   an address or number that the code says
    Number     some number below a limit, shifted: of a CPU, or a ticket of a trace
    Pointer    a literal plus a number, plus one of a few offsets
    UNKNOWN    anything

Registers that are not named hold what they held on entry.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Final

__all__ = [
    "ENTRY",
    "MAYBE_ARMED",
    "UNKNOWN",
    "Constant",
    "Entry",
    "Number",
    "Origin",
    "Pointer",
    "State",
    "Unknown",
    "Value",
    "join",
]


class Origin(Enum):
    """Where a number comes from."""

    CPU_ID = "cpu_id of the thread's rseq area, inside a restartable sequence"
    SEGMENT = "limit of the CPU-node segment"
    TICKET = "how many came before, of a trace"


@dataclass(frozen=True, slots=True)
class Entry:
    """What the register held on entry, less the literal at ``base_addr`` if that is not None."""

    base_addr: int | None = None


@dataclass(frozen=True, slots=True)
class Constant:
    """A value that is in the code or in a literal."""

    value: int


@dataclass(frozen=True, slots=True)
class Number:
    """A number below ``limit``, shifted left.

    Attributes:
        origin: Where it comes from.
        section: Descriptor of the sequence it was read in, or None.
        limit: What it is below before the shift.
        shift: Bits it was shifted.
    """

    origin: Origin
    section: int | None
    limit: int
    shift: int = 0


@dataclass(frozen=True, slots=True)
class Pointer:
    """A literal's value plus a number, plus one of some offsets."""

    number: Number
    base: int
    offsets: frozenset[int] = frozenset({0})


class Unknown(Enum):
    """Nothing is known."""

    UNKNOWN = "unknown"


UNKNOWN: Final = Unknown.UNKNOWN
Value = Entry | Constant | Number | Pointer | Unknown
ENTRY = Entry()

MAYBE_ARMED = -1
"""In ``State.armed``: a descriptor on one way, none on another."""


@dataclass(frozen=True, slots=True)
class State:
    """What is known before an instruction, on every way to it.

    Attributes:
        known: What the operand was on entry, or None.
        compared: What a zero flag would prove the operand to have been on entry, or None.
        has_flags: Whether a compare has set the flags.
        bound: (register, limit): what a carry flag would prove it to be below; or None.
        values: What registers hold that may not hold what they did on entry.
        saved: Register whose value on entry is below the stack pointer, or None.
        armed: Descriptor that ``rseq_cs`` points to, None for none, or ``MAYBE_ARMED``.
    """

    known: int | None = None
    compared: int | None = None
    has_flags: bool = False
    bound: tuple[int, int] | None = None
    values: Mapping[int, Value] = field(default_factory=dict)
    saved: int | None = None
    armed: int | None = None

    def value_of(self, register: int) -> Value:
        """Return what a register holds."""
        return self.values.get(register, ENTRY)

    def with_value(self, register: int, value: Value) -> State:
        """Return the state after a register was written."""
        values = {key: old for key, old in self.values.items() if key != register}
        if value != ENTRY:
            values[register] = value
        return replace(self, values=values)

    def without_flags(self) -> State:
        """Return the state after the flags were changed."""
        return replace(self, compared=None, has_flags=False, bound=None)

    def aborted(self) -> State:
        """Return the state in which the kernel enters the abort handler."""
        return replace(self.without_flags(), armed=None)


def join(one: State, other: State) -> State:
    """Return what is known where two ways meet."""
    values = {
        register: _join_values(one.value_of(register), other.value_of(register))
        for register in one.values.keys() | other.values.keys()
    }
    return State(
        known=one.known if one.known == other.known else None,
        compared=one.compared if one.compared == other.compared else None,
        has_flags=one.has_flags and other.has_flags,
        bound=one.bound if one.bound == other.bound else None,
        values=values,
        saved=one.saved if one.saved == other.saved else None,
        armed=one.armed if one.armed == other.armed else MAYBE_ARMED,
    )


def _join_values(one: Value, other: Value) -> Value:
    """Return what is known of a register that holds one value or another."""
    match one, other:
        case Pointer(number, base, some), Pointer(same, also, more) if (
            number == same and base == also
        ):
            return Pointer(number, base, some | more)
        case _:
            return one if one == other else UNKNOWN
