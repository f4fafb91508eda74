# SPDX-License-Identifier: Apache-2.0
"""The records that all layers share."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import pytest

from optpoline.model import (
    Addr,
    BlockPlan,
    CounterRows,
    Guard,
    Mapping,
    Miss,
    Module,
    OpenSlot,
    Refusal,
    Site,
    SiteKind,
    Split,
    Thunk,
    ThunkFlavour,
    tree_targets,
)


def make_mapping(perms: str = "r-xp") -> Mapping:
    """Return a mapping."""
    return Mapping(
        start=Addr(0x1000),
        end=Addr(0x3000),
        perms=perms,
        offset=0,
        device="00:00",
        inode=0,
        path="/lib/a.so",
    )


def make_site(code: bytes, disp_off: int) -> Site:
    """Return a site at 0x1000."""
    return Site(
        addr=Addr(0x1000),
        code=code,
        kind=SiteKind.CALL,
        disp_addr=Addr(0x1000 + disp_off),
        thunk=Thunk(addr=Addr(0x2000), operand="rax", flavour=ThunkFlavour.GCC, symbol="thunk_rax"),
        module="/bin/program",
        function="main",
        function_addr=Addr(0xFF0),
    )


@pytest.mark.parametrize(
    ("perms", "executable", "writable"),
    [("r-xp", True, False), ("rw-p", False, True), ("---p", False, False), ("rwxs", True, True)],
)
def test_mapping(perms: str, executable: bool, writable: bool) -> None:
    mapping = make_mapping(perms)
    assert (mapping.is_executable, mapping.is_writable) == (executable, writable)
    assert mapping.size == 0x2000


@pytest.mark.parametrize(
    ("path", "name"), [("/lib/a.so", "a.so"), ("a.out", "a.out"), ("/odd dir/b c", "b c")]
)
def test_module_name(path: str, name: str) -> None:
    module = Module(
        path=path,
        load_bias=0,
        start=Addr(0x1000),
        end=Addr(0x3000),
        mappings=(make_mapping(),),
        is_main=False,
        build_id=None,
    )
    assert module.name == name


@pytest.mark.parametrize(
    ("code", "disp_off"),
    [
        ("e8 01 02 03 04", 1),
        ("2e e8 01 02 03 04", 2),
        ("0f 84 01 02 03 04", 2),
        ("2e 2e e9 01 02 03 04", 3),
    ],
)
def test_site(code: str, disp_off: int) -> None:
    site = make_site(bytes.fromhex(code), disp_off)
    assert site.end == 0x1000 + len(bytes.fromhex(code))
    assert site.refusal is None


def test_records_do_not_change() -> None:
    site = make_site(b"\xe8\1\2\3\4", 1)
    with pytest.raises(FrozenInstanceError):
        site.refusal = Refusal.FLAGS_LIVE  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        make_mapping().perms = "rwxp"  # type: ignore[misc]


def test_tree_targets_root_first_each_side_once() -> None:
    a, b, c, d = (Addr(0x10 * i) for i in range(1, 5))
    tree = Guard(
        c, Split(b, Guard(a, None, Miss()), Guard(b, None, Miss())), Guard(d, Miss(), Miss())
    )
    targets = list(tree_targets(tree))
    assert targets[0] == c
    assert sorted(targets) == [a, b, c, d]
    assert list(tree_targets(Miss())) == []
    assert list(tree_targets(Split(a, Miss(), Miss()))) == []


def test_tree_targets_of_a_very_long_chain() -> None:
    tree: Guard | Miss = Miss()
    for i in range(5000, 0, -1):
        tree = Guard(Addr(i), None, tree)
    assert list(tree_targets(tree)) == list(range(1, 5001))


def test_refusals_read_as_clauses() -> None:
    for refusal in Refusal:
        assert refusal.value[0].islower()
        assert not refusal.value.endswith(".")
    assert len({refusal.value for refusal in Refusal}) == len(Refusal)


def test_cells_of_counter_rows() -> None:
    rows = CounterRows(shared_addr=Addr(0x10000), row_shift=16, n_cpus=3, rseq=None)
    assert (rows.row_size, rows.size) == (0x10000, 0x40000)
    cell = Addr(0x10018)
    assert [rows.cell_of_cpu(cell, cpu) for cpu in range(3)] == [0x20018, 0x30018, 0x40018]


def test_plans_that_no_block_carries_out() -> None:
    rows = CounterRows(shared_addr=Addr(0x10000), row_shift=16, n_cpus=3, rseq=None)
    slot = OpenSlot(target_addr=Addr(0x10010), count_addr=Addr(0x10018))
    tree, thunk = Guard(Addr(8), None, Miss()), Addr(0x100)
    hits = ((Addr(8), Addr(0x10010)),)
    with pytest.raises(ValueError, match="without counter rows"):
        BlockPlan(operand="rax", tree=tree, thunk_addr=thunk, hit_count_addrs=hits)
    with pytest.raises(ValueError, match="without counter rows"):
        BlockPlan(operand="rax", tree=tree, thunk_addr=thunk, open_slots=(slot,))
    with pytest.raises(ValueError, match="counts misses too"):
        BlockPlan(operand="rax", tree=tree, thunk_addr=thunk, rows=rows)
    with pytest.raises(ValueError, match="counted or traced"):
        BlockPlan(operand="rax", tree=tree, thunk_addr=thunk, thunk_targets=frozenset({Addr(8)}))
