# SPDX-License-Identifier: Apache-2.0
"""Counts of callgrind: only the program's own instructions, and none of a callee's."""

from __future__ import annotations

from bench.callgrind import read_executed

PROFILE = """\
positions: instr line
events: Ir

ob=/lib/libc.so.6
fl=???
fn=puts
0x10 0 99

ob=/bin/program
fl=main.c
fn=main
0x10 3 5
0x13 3 5
cob=/lib/libc.so.6
cfi=???
cfn=puts
calls=2 0x10 0
0x13 3 198
0x18 4 5
fn=other
0x10 9 1
totals: 115
"""


def test_counts_of_one_file() -> None:
    assert read_executed(PROFILE, "/bin/program") == {0x10: 6, 0x13: 5, 0x18: 5}


def test_a_file_that_was_not_run() -> None:
    assert read_executed(PROFILE, "/bin/other") == {}
