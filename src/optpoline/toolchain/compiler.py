# SPDX-License-Identifier: Apache-2.0
"""Find out what compiler a command is, by asking it.

Nothing is concluded from its name: ``cc`` may be anything, ``gcc`` may be clang.
"""

from __future__ import annotations

import re
import shlex
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from optpoline.errors import ToolchainError

__all__ = ["DEFAULT_COMMAND", "Compiler", "Family", "find_compiler", "run_compiler"]

DEFAULT_COMMAND = "gcc"

_QUESTION_TIMEOUT_S = 30.0
"""For a question that takes a compiler milliseconds: it may lie on a slow file system."""

_NAME_ONE = "name a C compiler with --cc"

_C_COMPILER_NAME = re.compile(r"^(?P<before>(?:.*-)?)(?P<name>gcc|cc)(?P<after>(?:-[0-9.]+)?)$")


class Family(Enum):
    """Whose compiler it is; flags differ."""

    GCC = "GCC"
    CLANG = "Clang"


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """A C compiler that answered.

    Attributes:
        command: What starts it, with what comes before it (a compiler cache) and its flags.
        family: Whose it is.
        version: As it says it, such as "12.2.0".
    """

    command: tuple[str, ...]
    family: Family
    version: str

    @property
    def major(self) -> int:
        """First number of its version."""
        return int(self.version.split(".")[0])

    @property
    def name(self) -> str:
        """How to name it to people.

        >>> Compiler(command=("gcc-12",), family=Family.GCC, version="12.2.0").name
        'gcc-12 (GCC 12.2.0)'
        """
        return f"{shlex.join(self.command)} ({self.family.value} {self.version})"

    @property
    def cxx_command(self) -> tuple[str, ...]:
        """What starts the C++ compiler that belongs to it, as names are given on all systems.

        >>> Compiler(command=("ccache", "gcc-12"), family=Family.GCC, version="12.2.0").cxx_command
        ('ccache', 'g++-12')
        """
        words = list(self.command)
        for place, word in enumerate(words):
            path = Path(word)
            match = _C_COMPILER_NAME.match(path.name)
            if match:
                cxx = "g++" if match["name"] == "gcc" else "c++"
                words[place] = str(path.with_name(match["before"] + cxx + match["after"]))
                break
        return tuple(words)


def run_compiler(argv: Sequence[str], *, timeout_s: float) -> subprocess.CompletedProcess[str]:
    """Run a compiler and return what it said, whether it succeeded or not.

    Raises:
        ToolchainError: if it cannot be started or takes too long.
    """
    try:
        return subprocess.run(
            argv,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except FileNotFoundError as error:
        raise ToolchainError(
            f"there is no compiler {argv[0]}", hint="install it, or name another with --cc"
        ) from error
    except OSError as error:
        raise ToolchainError(
            f"{argv[0]} cannot be run: {error.strerror}", hint=_NAME_ONE
        ) from error
    except subprocess.TimeoutExpired as error:
        raise ToolchainError(f"{argv[0]} did not end within {timeout_s:.0f} s") from error


def find_compiler(command: str) -> Compiler:
    """Ask a C compiler what it is.

    Args:
        command: As a shell would be told, such as "gcc", "ccache gcc-13".

    Raises:
        ToolchainError: if it cannot be run, is no compiler that we know, or makes code for
            another machine than x86-64.
    """
    try:
        words = tuple(shlex.split(command))
    except ValueError as error:
        raise ToolchainError(f"{command!r} is no command: {error}", hint=_NAME_ONE) from error
    if not words:
        raise ToolchainError("the name of the compiler is empty", hint=_NAME_ONE)
    macros = _read_macros(words)
    if "__x86_64__" not in macros or "__ILP32__" in macros:
        raise ToolchainError(f"{command} makes no 64-bit code for x86", hint=_NAME_ONE)
    family, prefix = Family.GCC, "__GNUC"
    if "__clang__" in macros:
        family, prefix = Family.CLANG, "__clang"
    names = ("_major__", "_minor__", "_patchlevel__")
    if family is Family.GCC:
        names = ("__", "_MINOR__", "_PATCHLEVEL__")
    numbers = [macros.get(prefix + name, "") for name in names]
    if not all(number.isdigit() for number in numbers):
        raise ToolchainError(f"{command} is neither GCC nor Clang", hint=_NAME_ONE)
    return Compiler(command=words, family=family, version=".".join(numbers))


def _read_macros(words: tuple[str, ...]) -> dict[str, str]:
    """Return the macros that the compiler predefines: what it says of itself to programs."""
    argv = [*words, "-dM", "-E", "-x", "c", "/dev/null"]
    done = run_compiler(argv, timeout_s=_QUESTION_TIMEOUT_S)
    macros: dict[str, str] = {}
    for line in done.stdout.splitlines():
        define, _, rest = line.partition(" ")
        if define == "#define":
            name, _, value = rest.partition(" ")
            macros[name] = value
    if done.returncode or not macros:
        raise ToolchainError(f"{shlex.join(words)} is no C compiler", hint=_NAME_ONE)
    return macros
