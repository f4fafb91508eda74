# SPDX-License-Identifier: Apache-2.0
"""Operations on counter cells as data, and what they do.

After cpu_opv (M. Desnoyers, "cpu_opv system call", LKML 2017-2018): a vector of up to 16
operations is run on behalf of one CPU, atomic with respect to restartable sequences that run
there, and answers as the fast path does: 0 done, the index of a comparison that failed, or an
error. All cells are u64 words of counter rows. A vector is validated as a whole first and
evaluated on a *shadow* of the cells it touches; only what a vector that reached its end would
store is then stored. So, other than in cpu_opv, a comparison that fails behind an addition
leaves that addition undone as well.

Pure: memory is read through a function that is handed in, and stores are returned, not made.
Who has the cells for itself meanwhile is ``controller/exclusion.py``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import assert_never

from optpoline.errors import OperationError
from optpoline.model import CELL_SIZE, Addr, CounterRows

__all__ = [
    "MAX_COPY_WORDS",
    "MAX_OPERATIONS",
    "MAX_VECTOR_SIZE",
    "Add",
    "And",
    "Barrier",
    "CompareEqual",
    "CompareNotEqual",
    "Copy",
    "Evaluation",
    "Operation",
    "OperationResult",
    "OperationStatus",
    "Or",
    "ShiftLeft",
    "ShiftRight",
    "Xor",
    "evaluate",
    "touched_cells",
    "validate",
]

MAX_OPERATIONS = 16
"""CPU_OP_VEC_LEN_MAX (include/uapi/linux/cpu_opv.h of the patch set)."""

MAX_COPY_WORDS = 4096 // CELL_SIZE
"""CPU_OP_DATA_LEN_MAX, in cells."""

MAX_VECTOR_SIZE = 4096 + 15 * CELL_SIZE
"""CPU_OP_VEC_DATA_LEN_MAX: bytes that all operations of a vector touch together."""

_WORD = 1 << 64
_WORD_BITS = 64


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareEqual:
    """Go on only if a cell holds ``value``."""

    addr: Addr
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class CompareNotEqual:
    """Go on only if a cell does not hold ``value``."""

    addr: Addr
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Add:
    """Add ``value`` to a cell, modulo 2^64; negative to subtract."""

    addr: Addr
    value: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Or:
    """Set the bits of ``mask`` in a cell."""

    addr: Addr
    mask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class And:
    """Clear the bits of a cell that are not in ``mask``."""

    addr: Addr
    mask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Xor:
    """Flip the bits of ``mask`` in a cell."""

    addr: Addr
    mask: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftLeft:
    """Shift a cell left by 0 to 63 bits; what leaves it is lost."""

    addr: Addr
    n_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class ShiftRight:
    """Shift a cell right by 0 to 63 bits, zeros moving in."""

    addr: Addr
    n_bits: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Copy:
    """Copy ``n_words`` cells from ``src`` to ``dst``, which must not overlap."""

    dst: Addr
    src: Addr
    n_words: int


@dataclass(frozen=True, slots=True)
class Barrier:
    """Order what is before it against what is after it.

    Nothing to do on x86: a vector loads all it needs before its first store, its stores become
    visible in program order (total store order), and entering and leaving the exclusion are
    system calls on the CPU concerned, or stops of every thread, each a full barrier.
    """


Operation = (
    CompareEqual | CompareNotEqual | Add | Or | And | Xor | ShiftLeft | ShiftRight | Copy | Barrier
)


class OperationStatus(Enum):
    """How a vector ended; errors are raised."""

    DONE = 0
    COMPARISON_FAILED = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class OperationResult:
    """What a vector came to.

    Attributes:
        status: Whether all of it was done or none of it.
        index: Of the comparison that failed, counted from 0; None if all was done.
    """

    status: OperationStatus
    index: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Evaluation:
    """What a vector comes to on the cells as they were read.

    Attributes:
        result: What to answer.
        stores: (cell, value) to be stored one after the other; none if a comparison failed.
    """

    result: OperationResult
    stores: tuple[tuple[Addr, int], ...]


def touched_cells(operation: Operation) -> tuple[tuple[Addr, int], ...]:
    """Return the runs of cells that an operation reads or writes: (first, how many)."""
    match operation:
        case Barrier():
            return ()
        case Copy(dst=dst, src=src, n_words=n_words):
            return (dst, n_words), (src, n_words)
        case _:
            return ((operation.addr, 1),)


def validate(operations: Sequence[Operation], rows: CounterRows, cpu: int | None) -> None:
    """Check a whole vector before any of it is done.

    Args:
        operations: The vector; an empty one is done at once.
        rows: Where its cells must be: each run of cells within one row.
        cpu: Whose row may be touched, besides row 0; None for row 0 alone.

    Raises:
        OperationError: if an operation makes no sense; it says which.
    """
    if cpu is not None and not 0 <= cpu < rows.n_cpus:
        raise OperationError(None, f"there is no CPU {cpu} in {rows.n_cpus} counter rows")
    if len(operations) > MAX_OPERATIONS:
        raise OperationError(
            None, f"{len(operations)} operations are more than the {MAX_OPERATIONS} of a vector"
        )
    size = 0
    for index, operation in enumerate(operations):
        _validate_values(index, operation)
        for addr, n_cells in touched_cells(operation):
            _validate_cells(index, addr, n_cells, rows, cpu)
        size += _data_size(operation)
    if size > MAX_VECTOR_SIZE:
        raise OperationError(
            None, f"{size} bytes are more than the {MAX_VECTOR_SIZE} that a vector may touch"
        )


def _data_size(operation: Operation) -> int:
    """Return how many bytes an operation counts for, as cpu_opv does."""
    if isinstance(operation, Barrier):
        return 0
    return CELL_SIZE * (operation.n_words if isinstance(operation, Copy) else 1)


def _validate_values(index: int, operation: Operation) -> None:
    """Check the constants of one operation."""
    match operation:
        case CompareEqual(value=value) | CompareNotEqual(value=value):
            is_valid = 0 <= value < _WORD
        case Or(mask=value) | And(mask=value) | Xor(mask=value):
            is_valid = 0 <= value < _WORD
        case Add(value=value):
            is_valid = -_WORD // 2 <= value < _WORD
        case ShiftLeft(n_bits=value) | ShiftRight(n_bits=value):
            is_valid = 0 <= value < _WORD_BITS
        case Copy(dst=dst, src=src, n_words=value):
            is_valid = 0 <= value <= MAX_COPY_WORDS and abs(dst - src) >= CELL_SIZE * value
        case Barrier():
            return
        case _:
            assert_never(operation)
    if not is_valid:
        raise OperationError(index, f"{operation} has a value out of range")


def _validate_cells(
    index: int, addr: Addr, n_cells: int, rows: CounterRows, cpu: int | None
) -> None:
    """Check that a run of cells is aligned and inside one row that may be touched."""
    row, off = divmod(addr - rows.shared_addr, rows.row_size)
    if addr % CELL_SIZE:
        raise OperationError(index, f"{addr:#x} is no multiple of {CELL_SIZE}")
    if row not in ({0} if cpu is None else {0, 1 + cpu}):
        whose = "row 0" if cpu is None else f"row 0 and that of CPU {cpu}"
        raise OperationError(index, f"{addr:#x} is outside {whose}")
    if off + CELL_SIZE * n_cells > rows.row_size:
        raise OperationError(index, f"{n_cells} cells from {addr:#x} on leave their row")


def evaluate(operations: Sequence[Operation], load: Callable[[Addr], int]) -> Evaluation:
    """Work a valid vector out on a shadow of the cells.

    Args:
        operations: The vector.
        load: Reads a cell; called once for each cell that is needed.

    >>> cells = {Addr(0): 5, Addr(8): 0}
    >>> vector = [CompareEqual(addr=Addr(0), value=5), Add(addr=Addr(8), value=2)]
    >>> evaluate(vector, cells.__getitem__).stores
    ((8, 2),)
    >>> vector.append(CompareNotEqual(addr=Addr(8), value=2))
    >>> evaluate(vector, cells.__getitem__).result.index
    2
    """
    shadow: dict[Addr, int] = {}
    stores: list[tuple[Addr, int]] = []

    def read(addr: Addr) -> int:
        """Return what a cell holds at this point of the vector."""
        if addr not in shadow:
            shadow[addr] = load(addr)
        return shadow[addr]

    for index, operation in enumerate(operations):
        match operation:
            case CompareEqual(addr=addr, value=value):
                is_met = read(addr) == value
            case CompareNotEqual(addr=addr, value=value):
                is_met = read(addr) != value
            case _:
                is_met = True
                for addr, value in _changes(operation, read):
                    shadow[addr] = value
                    stores.append((addr, value))
        if not is_met:
            failed = OperationStatus.COMPARISON_FAILED
            return Evaluation(result=OperationResult(status=failed, index=index), stores=())
    return Evaluation(result=OperationResult(status=OperationStatus.DONE), stores=tuple(stores))


def _changes(
    operation: Add | Or | And | Xor | ShiftLeft | ShiftRight | Copy | Barrier,
    read: Callable[[Addr], int],
) -> list[tuple[Addr, int]]:
    """Return what an operation stores."""
    match operation:
        case Add(addr=addr, value=value):
            return [(addr, (read(addr) + value) % _WORD)]
        case Or(addr=addr, mask=mask):
            return [(addr, read(addr) | mask)]
        case And(addr=addr, mask=mask):
            return [(addr, read(addr) & mask)]
        case Xor(addr=addr, mask=mask):
            return [(addr, read(addr) ^ mask)]
        case ShiftLeft(addr=addr, n_bits=n_bits):
            return [(addr, (read(addr) << n_bits) % _WORD)]
        case ShiftRight(addr=addr, n_bits=n_bits):
            return [(addr, read(addr) >> n_bits)]
        case Copy(dst=dst, src=src, n_words=n_words):
            offs = range(0, CELL_SIZE * n_words, CELL_SIZE)
            return [(Addr(dst + off), read(Addr(src + off))) for off in offs]
        case Barrier():
            return []
        case _:
            assert_never(operation)
