# SPDX-License-Identifier: Apache-2.0
"""Which memory below a stack pointer is that stack's own."""

from __future__ import annotations

import pytest

from optpoline.model import Addr, Mapping
from optpoline.process.own_stack import is_own_stack


def mapping(start: int, end: int, perms: str, path: str = "") -> Mapping:
    return Mapping(
        start=Addr(start), end=Addr(end), perms=perms, offset=0, device="0", inode=0, path=path
    )


MAPS = (
    mapping(0x1000, 0x9000, "rw-p", "/program"),
    mapping(0x10000, 0x40000, "rw-p", "[heap]"),
    mapping(0x50000, 0x51000, "---p"),
    mapping(0x51000, 0x60000, "rw-p"),
    mapping(0x60000, 0x61000, "rw-p"),
    mapping(0x70000, 0x71000, "---p"),
    mapping(0x71000, 0x71000 + (65 << 20), "rw-p"),
    mapping(0x7FF0_0000, 0x7FF2_0000, "rw-p", "[stack]"),
)


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        pytest.param(0x7FF1_0000, 0x7FF1_3000, True, id="main"),
        pytest.param(0x7FEF_E000, 0x7FF0_1000, True, id="main that has to grow"),
        pytest.param(0x71000 + (64 << 20), 0x7FF0_1000, False, id="into what is below the main"),
        pytest.param(0x52000, 0x55000, True, id="a thread's"),
        pytest.param(0x51000, 0x60000, True, id="all of a thread's"),
        pytest.param(0x50FF8, 0x53000, False, id="into the guard page"),
        pytest.param(0x5F000, 0x60010, False, id="another mapping above it"),
        pytest.param(0x2000, 0x5000, False, id="an alternate stack in static memory"),
        pytest.param(0x20000, 0x23000, False, id="a coroutine's in the heap"),
        pytest.param(0x72000, 0x75000, False, id="an arena of stacks"),
        pytest.param(0xA000, 0xB000, False, id="nothing there"),
        pytest.param(0x7FFF_0000, 0x7FFF_1000, False, id="above everything"),
    ],
)
def test_is_own_stack(low: int, high: int, expected: bool) -> None:
    assert is_own_stack(MAPS, low, high) is expected
