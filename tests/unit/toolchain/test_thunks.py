# SPDX-License-Identifier: Apache-2.0
"""Our thunks: which form they have, who chooses it, and that calls through them arrive."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from optpoline.model import Addr
from optpoline.toolchain.compiler import find_compiler
from optpoline.toolchain.flags import Form, compile_flags, link_flags
from optpoline.x86.thunks import ThunkShape, decode_thunk_body

SOURCE = r"""
#include <stdio.h>
extern unsigned char thunk[] __asm__("__x86_indirect_thunk_r11")
    __attribute__((visibility("hidden")));
static int calls;
static void count(void) { calls++; }
void (*volatile pointer)(void) = count;
int main(void)
{
    char line[4096], rights[5];
    unsigned long start, end, place = (unsigned long)thunk;
    for (int i = 0; i < 7; i++)
        pointer();
    FILE *maps = fopen("/proc/self/maps", "r");
    while (fgets(line, sizeof line, maps))
        if (sscanf(line, "%lx-%lx %4s", &start, &end, rights) == 3 && start <= place && place < end)
            printf("%d %s ", calls, rights);
    for (int i = 0; i < 32; i++)
        printf("%02x", thunk[i]);
    return 0;
}
"""
"""r11 is the register of Clang's thunks."""

Program = Callable[..., bytes]


@pytest.fixture(scope="module", params=["gcc", "clang"])
def run_program(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Program:
    """Return a function that runs the program and returns the bytes of its thunk."""
    command = str(request.param)
    if not shutil.which(command):
        pytest.skip(f"{command} is not installed")
    compiler = find_compiler(command)
    path = tmp_path_factory.mktemp("thunks") / "program"
    flags = [*compile_flags(compiler, Form.RETPOLINE), "-O1", "-x", "c", "-", "-o", str(path)]
    argv = [command, *flags, "-x", "none", *link_flags(Form.RETPOLINE)]
    subprocess.run(argv, input=SOURCE, text=True, check=True, timeout=60)

    def run(wish: str | None) -> bytes:
        environment = {name: value for name, value in os.environ.items() if "THUNKS" not in name}
        if wish is not None:
            environment["OPTPOLINE_THUNKS"] = wish
        done = subprocess.run([path], env=environment, capture_output=True, check=True, timeout=10)
        calls, rights, code = done.stdout.split()
        assert calls == b"7"
        assert rights == b"r-xp"
        return bytes.fromhex(code.decode())

    return run


@pytest.mark.parametrize("wish", [None, "", "retpoline", "lfenc", "lfence2", "plainer"])
def test_retpolines_unless_told_otherwise(run_program: Program, wish: str | None) -> None:
    body = decode_thunk_body(run_program(wish), Addr(0))
    assert body is not None
    assert (body.shape, body.operand) == (ThunkShape.RETPOLINE, "r11")


def test_lfence(run_program: Program) -> None:
    body = decode_thunk_body(run_program("lfence"), Addr(0))
    assert body is not None
    assert (body.shape, body.operand) == (ThunkShape.LFENCE, "r11")


def test_plain(run_program: Program) -> None:
    # jmp *%r11 ; int3...
    assert run_program("plain") == bytes.fromhex("41ffe3").ljust(32, b"\xcc")


def test_every_register_has_its_own(tmp_path: Path) -> None:
    (source,) = link_flags(Form.RETPOLINE)
    made = tmp_path / "thunks.o"
    subprocess.run(["gcc", "-c", source, "-o", made], check=True, timeout=60)
    listed = subprocess.run(["nm", made], capture_output=True, text=True, check=True).stdout
    named = sorted(line.split()[-1] for line in listed.splitlines() if "__x86" in line)
    numbered = [f"r{number}" for number in range(8, 16)]
    registers = ["rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", *numbered]
    assert named == sorted(f"__x86_indirect_thunk_{register}" for register in registers)
