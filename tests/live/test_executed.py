# SPDX-License-Identifier: Apache-2.0
"""What keys and static calls execute, instruction by instruction, as built and when set."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

import optpoline
from bench.declared.program import LAYOUTS, Calls
from bench.declared.walk import walk_round

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"
SOURCES = sorted((ROOT / "bench" / "declared").glob("*.c"))


def walk(calls: Calls, form: str) -> list[str]:
    """Return the mnemonics of a round."""
    return [one.mnemonic for one in walk_round(calls, form)]


def test_there_and_back(tmp_path: Path) -> None:
    path = tmp_path / "calls"
    # Without the plugin nobody knows its attribute; no site of it is in question here.
    flags = ["-O2", "-fcf-protection=none", "-Wno-attributes", f"-I{INCLUDE}", *LAYOUTS[1].flags]
    subprocess.run(["gcc", *flags, *map(str, SOURCES), "-o", str(path)], check=True)
    with Calls(path) as calls:
        empty, direct = walk(calls, "empty"), walk(calls, "direct")
        assert (empty, direct[0]) == (["add", "sub", "jne"], "call")
        by_trampoline = ["call", "jmp", *direct[1:]]
        off = ["add", "nopl", "sub", "jne"]
        on = ["add", "jmp", "add", "jmp", "sub", "jne"]
        with optpoline.declared(calls.pid) as program:
            for is_set in (False, True, False):
                if is_set:
                    with program.transaction() as transaction:
                        transaction.static_call("chosen").update("hot")
                        transaction.static_call("elsewhere").update("hot")
                        transaction.key("feature").enable()
                elif program.key("feature").enabled:
                    assert program.reset() == 3
                assert walk(calls, "static_inline") == (direct if is_set else by_trampoline)
                assert walk(calls, "static_out_of_line") == by_trampoline
                assert walk(calls, "key") == (on if is_set else off)
