# SPDX-License-Identifier: Apache-2.0
"""What is proved of code holds whichever way its keys and static calls go."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from optpoline.discover import ModuleImage, flags_dead_at, operand_dead_at
from optpoline.discover.changeable import Changeable
from optpoline.model import Addr
from optpoline.x86.assembler import encode_disp32
from optpoline.x86.flags import FlagsFate, run_flags
from optpoline.x86.liveness import RegisterFate, run_register

INCLUDE = Path(__file__).parents[3] / "src" / "optpoline" / "share" / "include"

SOURCE = r"""
#include "optpoline.h"
DEFINE_STATIC_KEY_FALSE(trace);
__attribute__((noipa)) static int first(int value) { return value; }
DEFINE_STATIC_CALL(codec, first);

/* Where the key is off the flags and rax are written; where it is on they are read. */
__attribute__((naked, used)) void read_if_enabled(void)
{
    __asm__ volatile("nop");
    if (static_branch_unlikely(&trace))
        goto enabled;
    __asm__ volatile("xorl %%eax, %%eax\n\tret" ::: "memory");
enabled:
    __asm__ volatile("setc %%cl\n\tmovq %%rax, (%%rsp)\n\tret" ::: "memory");
}
__attribute__((naked, used)) void dead_either_way(void)
{
    __asm__ volatile("nop");
    if (static_branch_unlikely(&trace))
        goto enabled;
    __asm__ volatile("xorl %%eax, %%eax\n\tret" ::: "memory");
enabled:
    __asm__ volatile("xorl %%ecx, %%ecx\n\tmovl $1, %%eax\n\tret" ::: "memory");
}
__attribute__((noipa)) int calls(int value) { return static_call(codec)(value) + 1; }
int main(void) { return calls(-1); }
"""


@pytest.fixture
def image(tmp_path: Path) -> ModuleImage:
    path = tmp_path / "program"
    source = path.with_suffix(".c")
    source.write_text(SOURCE)
    flags = ("-O2", "-fcf-protection=none", f"-I{INCLUDE}")
    subprocess.run(["gcc", *flags, str(source), "-o", str(path)], check=True, capture_output=True)
    return ModuleImage.from_file(str(path))


def find(image: ModuleImage, name: str) -> Addr:
    """Return the address of a function."""
    return next(
        addr for found, addr, _ in image.symbols.find_containing((name.encode(),)) if found == name
    )


def test_both_ways_of_a_key_are_followed(image: ModuleImage) -> None:
    assert len(image.changeable.forks) == 2
    assert operand_dead_at(image, find(image, "dead_either_way"), "rax")
    assert not operand_dead_at(image, find(image, "read_if_enabled"), "rax")


def test_nobody_knows_what_a_static_call_does(image: ModuleImage) -> None:
    assert find(image, "first") in image.changeable.calls
    assert not operand_dead_at(image, find(image, "calls"), "rax")
    # What it calls now writes rax.
    image.__dict__["changeable"] = Changeable()
    assert operand_dead_at(image, find(image, "calls"), "rax")


def test_runs_end_at_forks() -> None:
    code = bytes.fromhex("0f1f440000 31c0 c3")  # nopl; xor eax, eax; ret
    forks = {Addr(0): (Addr(0x40), Addr(5))}
    assert run_flags(code, Addr(0)).fate is FlagsFate.DEAD
    flags = run_flags(code, Addr(0), forks=forks)
    assert (flags.fate, flags.successors) == (FlagsFate.BRANCH, (0x40, 5))
    register = run_register(code, Addr(0), "rax", forks=forks)
    assert (register.fate, register.successors) == (RegisterFate.BRANCH, (0x40, 5))


def test_flags_behind_a_key(image: ModuleImage) -> None:
    for name, is_dead in (("dead_either_way", True), ("read_if_enabled", False)):
        start = find(image, name)
        fork = min(addr for addr in image.changeable.forks if addr >= start)
        assert fork > start  # at its entry flags would be dead by convention
        assert flags_dead_at(image, fork) == is_dead


def test_the_targets_are_those_of_the_text_that_is_followed(image: ModuleImage) -> None:
    texts, trampoline = image.texts, find(image, "optpoline.call.codec")
    elsewhere = find(image, "main")

    class Redirected:
        """The program's memory after the text was read: another target, which nobody declared."""

        def read(self, addr: int, size: int) -> bytes:
            data = bytearray(image.__class__.read(image, Addr(addr), size))
            if addr <= trampoline < addr + size:
                off = trampoline + 1 - addr
                data[off : off + 4] = encode_disp32(trampoline + 5, elsewhere)
            return bytes(data)

    later = ModuleImage(image.module, Redirected(), image.facts, image._files)
    later.__dict__["texts"] = texts
    first = find(image, "first")
    assert {first, trampoline} <= later.changeable.calls
    assert elsewhere not in later.changeable.calls
    # Read anew, the text is that of now.
    image.drop_text()
    assert "changeable" not in image.__dict__
