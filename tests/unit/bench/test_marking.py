# SPDX-License-Identifier: Apache-2.0
"""Executed branches: the indirect ones of the program, with switches told apart."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from bench.marking.branches import find_executed_branches
from bench.marking.sizes import read_sizes
from tests.unit.toolchain.marked_code import read_code

SOURCE = """
#include <stdio.h>
int (*call)(int);
int called(int i) { return call(i) + 1; }
int tail(int i) { return call(i); }
int chosen(int i)
{
    switch (i) {
    case 0: return puts("a"); case 1: return puts("b") * 3; case 2: return putchar(1) + 9;
    case 3: return puts("d") - 7; case 4: return putchar(2); case 5: return puts("f") ^ i;
    }
    return 0;
}
int main(void) { return 0; }
"""


@pytest.mark.parametrize(
    ("flags", "switches"),
    [
        (("-fcf-protection=branch",), {"chosen"}),
        (("-fcf-protection=none", "-mindirect-branch=thunk"), set()),
    ],
    ids=["plain", "retpolines"],
)
def test_indirect_branches(flags: tuple[str, ...], switches: set[str], tmp_path: Path) -> None:
    path = tmp_path / "program"
    argv = ["gcc", "-O2", "-fno-inline", *flags, "-x", "c", "-", "-o", str(path)]
    subprocess.run(argv, input=SOURCE, text=True, check=True, timeout=30)
    by_other_means = read_code(path, runtime=frozenset())
    executed = dict.fromkeys(by_other_means.branches, 2)
    found = find_executed_branches(path, executed)
    assert {"called", "tail"} <= {one.function for one in found}
    assert {one.function for one in found if one.is_switch} == switches
    assert {one.function for one in found} == {"called", "tail"} | switches
    assert {one.count for one in found} == {2}
    assert find_executed_branches(path, {}) == ()


def test_sizes(tmp_path: Path) -> None:
    path = tmp_path / "program"
    argv = ["gcc", "-O2", "-x", "c", "-", "-o", str(path)]
    subprocess.run(argv, input=SOURCE, text=True, check=True, timeout=30)
    sizes = read_sizes(path)
    assert sizes.notes == 0
    assert 100 < sizes.text < sizes.read_only < path.stat().st_size
