# SPDX-License-Identifier: Apache-2.0
"""Operation vectors: what they do, that they do all or nothing, and what is refused."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.errors import OperationError
from optpoline.learn.operations import (
    MAX_COPY_WORDS,
    MAX_OPERATIONS,
    Add,
    And,
    Barrier,
    CompareEqual,
    CompareNotEqual,
    Copy,
    Operation,
    OperationResult,
    OperationStatus,
    Or,
    ShiftLeft,
    ShiftRight,
    Xor,
    evaluate,
    validate,
)
from optpoline.model import Addr, CounterRows

BASE = 0x7000_0000_0000
ROWS = CounterRows(shared_addr=Addr(BASE), row_shift=13, n_cpus=4, rseq=None)
DONE = OperationResult(status=OperationStatus.DONE)
WORD = (1 << 64) - 1


def cell(number: int, cpu: int | None = 2) -> Addr:
    """Return a cell of a CPU's row."""
    addr = Addr(BASE + 8 * number)
    return addr if cpu is None else ROWS.cell_of_cpu(addr, cpu)


def apply(operations: list[Operation], cells: dict[Addr, int]) -> OperationResult:
    """Run a vector on cells that are 0 unless given."""
    evaluation = evaluate(operations, lambda addr: cells.get(addr, 0))
    cells.update(evaluation.stores)
    return evaluation.result


@pytest.mark.parametrize(
    ("operation", "before", "after"),
    [
        (Add(addr=cell(0), value=2), 5, 7),
        (Add(addr=cell(0), value=-6), 5, WORD),
        (Add(addr=cell(0), value=WORD), 5, 4),
        (Or(addr=cell(0), mask=1 << 63), 5, 5 | 1 << 63),
        (And(addr=cell(0), mask=6), 5, 4),
        (Xor(addr=cell(0), mask=WORD), 5, WORD - 5),
        (ShiftLeft(addr=cell(0), n_bits=62), 5, 1 << 62),
        (ShiftLeft(addr=cell(0), n_bits=0), 5, 5),
        (ShiftRight(addr=cell(0), n_bits=63), 5 | 1 << 63, 1),
        (CompareEqual(addr=cell(0), value=5), 5, 5),
        (CompareNotEqual(addr=cell(0), value=4), 5, 5),
        (Barrier(), 5, 5),
    ],
)
def test_each_operation(operation: Operation, before: int, after: int) -> None:
    cells = {cell(0): before}
    assert apply([operation], cells) == DONE
    assert cells == {cell(0): after}


def test_copy() -> None:
    cells = {cell(0): 1, cell(1): 2}
    assert apply([Copy(dst=cell(2), src=cell(0), n_words=2)], cells) == DONE
    assert cells == {cell(0): 1, cell(1): 2, cell(2): 1, cell(3): 2}


def test_later_operations_see_what_earlier_ones_did() -> None:
    cells = {cell(0): 3}
    vector: list[Operation] = [
        Add(addr=cell(0), value=1),
        Copy(dst=cell(1), src=cell(0), n_words=1),
        ShiftLeft(addr=cell(1), n_bits=4),
        CompareEqual(addr=cell(1), value=64),
        CompareEqual(addr=cell(0), value=4),
    ]
    assert apply(vector, cells) == DONE
    assert cells == {cell(0): 4, cell(1): 64}


def test_stores_are_in_the_order_of_the_vector() -> None:
    vector: list[Operation] = [
        Add(addr=cell(3), value=1),
        Add(addr=cell(0), value=1),
        Add(addr=cell(3), value=1),
    ]
    assert evaluate(vector, lambda _: 0).stores == ((cell(3), 1), (cell(0), 1), (cell(3), 2))


def test_empty_vector_is_done() -> None:
    validate([], ROWS, None)
    assert apply([], {}) == DONE


@pytest.mark.parametrize("at", range(4))
def test_failed_comparison_changes_nothing(at: int) -> None:
    cells = {cell(0): 3}
    vector: list[Operation] = [Add(addr=cell(0), value=1) for _ in range(3)]
    vector.insert(at, CompareNotEqual(addr=cell(0), value=3 + at))
    result = apply(vector, cells)
    assert result.status is OperationStatus.COMPARISON_FAILED
    assert result.index == at
    assert cells == {cell(0): 3}


@pytest.mark.parametrize(
    ("vector", "at", "reason"),
    [
        ([Add(addr=Addr(cell(0) + 4), value=1)], 0, "multiple of 8"),
        ([Barrier(), Add(addr=cell(0, 1), value=1)], 1, "outside row 0 and that of CPU 2"),
        ([Add(addr=Addr(BASE - 8), value=1)], 0, "outside"),
        ([Add(addr=Addr(BASE + (5 << 13)), value=1)], 0, "outside"),
        ([Add(addr=cell(0), value=1 << 64)], 0, "out of range"),
        ([Add(addr=cell(0), value=-(1 << 63) - 1)], 0, "out of range"),
        ([CompareEqual(addr=cell(0), value=-1)], 0, "out of range"),
        ([CompareNotEqual(addr=cell(0), value=1 << 64)], 0, "out of range"),
        ([And(addr=cell(0), mask=-1)], 0, "out of range"),
        ([ShiftLeft(addr=cell(0), n_bits=64)], 0, "out of range"),
        ([ShiftRight(addr=cell(0), n_bits=-1)], 0, "out of range"),
        ([Copy(dst=cell(0), src=cell(600), n_words=MAX_COPY_WORDS + 1)], 0, "out of range"),
        ([Copy(dst=cell(0), src=cell(600), n_words=-1)], 0, "out of range"),
        ([Copy(dst=cell(3), src=cell(0), n_words=4)], 0, "out of range"),
        ([Copy(dst=cell(1023), src=cell(0), n_words=2)], 0, "leave their row"),
        ([Copy(dst=cell(0), src=cell(1023), n_words=2)], 0, "leave their row"),
        ([Barrier()] * (MAX_OPERATIONS + 1), None, "more than the 16"),
        ([Copy(dst=cell(0), src=cell(512), n_words=300)] * 2, None, "may touch"),
    ],
)
def test_refused(vector: list[Operation], at: int | None, reason: str) -> None:
    with pytest.raises(OperationError, match=reason) as caught:
        validate(vector, ROWS, 2)
    assert caught.value.index == at


def test_without_a_cpu_only_row_0() -> None:
    validate([Add(addr=cell(0, None), value=1)], ROWS, None)
    validate([Add(addr=cell(0, None), value=1)], ROWS, 3)
    with pytest.raises(OperationError, match="outside row 0"):
        validate([Add(addr=cell(0, 0), value=1)], ROWS, None)
    for cpu in (-1, 4):
        with pytest.raises(OperationError, match=f"no CPU {cpu}"):
            validate([], ROWS, cpu)


def test_longest_vector_is_accepted() -> None:
    copy = Copy(dst=cell(0), src=cell(512), n_words=MAX_COPY_WORDS)
    validate([copy, *[Add(addr=cell(0), value=1)] * 15], ROWS, 2)


words = st.integers(0, WORD)
cells_used = st.integers(0, 3).map(cell)
operation = st.one_of(
    st.builds(Add, addr=cells_used, value=st.integers(-(1 << 63), WORD)),
    st.builds(Or, addr=cells_used, mask=words),
    st.builds(And, addr=cells_used, mask=words),
    st.builds(Xor, addr=cells_used, mask=words),
    st.builds(ShiftLeft, addr=cells_used, n_bits=st.integers(0, 63)),
    st.builds(ShiftRight, addr=cells_used, n_bits=st.integers(0, 63)),
    st.builds(CompareEqual, addr=cells_used, value=st.integers(0, 2)),
    st.builds(CompareNotEqual, addr=cells_used, value=st.integers(0, 2)),
)


@given(st.lists(operation, max_size=MAX_OPERATIONS), st.lists(words, min_size=4, max_size=4))
def test_a_vector_is_its_operations_one_by_one(vector: list[Operation], values: list[int]) -> None:
    whole = dict(zip(map(cell, range(4)), values, strict=True))
    before, single = dict(whole), dict(whole)
    validate(vector, ROWS, 2)
    result = apply(vector, whole)
    for index, one in enumerate(vector):
        if apply([one], single) != DONE:
            assert result.index == index
            assert whole == before
            return
    assert result == DONE
    assert whole == single
    assert all(0 <= value <= WORD for value in whole.values())
