# SPDX-License-Identifier: Apache-2.0
"""What a program executed, instruction by instruction, counted by valgrind's callgrind.

It simulates the program and counts each instruction at its address: nothing is sampled, and
how fast the machine is does not matter. Counted is what belongs to one file, the program;
the C library and the dynamic linker are not ours to compare.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.commands import require_command
from bench.errors import BenchError

__all__ = ["Executed", "count_executed", "read_executed"]

Executed = dict[int, int]
"""Address in the file to how often the instruction there was executed."""

_OPTIONS = (
    "--tool=callgrind",
    "--dump-instr=yes",
    # Each line tells its whole address and name, not what is new in it.
    "--compress-pos=no",
    "--compress-strings=no",
)


def count_executed(executable: Path, run: Callable[[Sequence[str]], str]) -> tuple[Executed, str]:
    """Count what a program executes.

    Args:
        executable: The program.
        run: Runs it with the words given in front of its command; returns what it computed.

    Returns:
        The counts, and what ``run`` returned.

    Raises:
        BenchError: if it cannot be run, or nothing of it was executed.
    """
    valgrind = require_command("valgrind", package="valgrind")
    with tempfile.TemporaryDirectory(prefix="callgrind-") as directory:
        out = Path(directory) / "out"
        result = run([valgrind, *_OPTIONS, f"--callgrind-out-file={out}"])
        if not out.exists():
            raise BenchError(f"callgrind wrote nothing about {executable.name}")
        executed = read_executed(out.read_text(errors="replace"), str(executable))
    if not executed:
        raise BenchError(f"callgrind saw nothing of {executable.name}")
    return executed, result


def read_executed(text: str, name: str) -> Executed:
    r"""Read the counts of one file from what callgrind wrote.

    Args:
        text: A profile with instructions, nothing in it compressed.
        name: Path of the file.

    >>> read_executed("ob=/a\n0x10 3 5\ncalls=2 0x99 1\n0x12 3 700\n0x10 3 1\n", "/a")
    {16: 6}
    """
    executed: Executed = {}
    is_ours = False
    is_of_callee = False
    for line in text.splitlines():
        if line.startswith("ob="):
            is_ours = line[3:] == name
        elif line.startswith("calls="):
            # The next line is what the callee cost, at the call that is counted by itself.
            is_of_callee = True
        elif line.startswith("0x"):
            if is_ours and not is_of_callee:
                addr, _, count = line.split()
                executed[int(addr, 16)] = executed.get(int(addr, 16), 0) + int(count)
            is_of_callee = False
    return executed
