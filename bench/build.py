# SPDX-License-Identifier: Apache-2.0
"""The same program, built several ways with the same compiler.

Only what the user would change is changed: ``-O2 -g`` in each, and retpolines on top.
Control-flow enforcement is off in each, because gcc refuses it together with retpolines; but
for ``PLUGIN_TRACKED``, where it makes gcc mark the jumps of switch tables as such.
A build whose inputs and flags are unchanged is not repeated.
"""

from __future__ import annotations

import functools
import hashlib
import json
import shlex
import shutil
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from enum import Enum
from pathlib import Path

from bench.commands import run_command
from bench.errors import BenchError
from bench.paths import BUILD, OPTPOLINE

__all__ = ["Variant", "build_once", "compile_program", "variant_flags"]

_JOBS = 2


class Variant(Enum):
    """How a program is built."""

    PLAIN = "plain"
    RETPOLINE = "retpoline"
    PGO = "retpoline, -fprofile-use"
    NO_TABLES = "plain, -fno-jump-tables"
    PLUGIN = "plugin"
    PLUGIN_RETPOLINE = "plugin, retpoline"
    PLUGIN_TRACKED = "plugin, -fcf-protection=branch"

    @property
    def directory(self) -> str:
        """Name of its directory."""
        return self.name.lower()


_OPTIMISED = ("-O2", "-g")
_COMMON = (*_OPTIMISED, "-fcf-protection=none")
_RETPOLINE = ("-mindirect-branch=thunk", "-mindirect-branch-register")


def variant_flags(variant: Variant) -> tuple[str, ...]:
    """Compiler flags of a variant, without those of profiling."""
    match variant:
        case Variant.PLAIN:
            return _COMMON
        case Variant.NO_TABLES:
            return (*_COMMON, "-fno-jump-tables")
        case Variant.RETPOLINE | Variant.PGO:
            return _COMMON + _RETPOLINE
        case Variant.PLUGIN:
            return _COMMON + _plugin_flags()
        case Variant.PLUGIN_RETPOLINE:
            return _COMMON + _RETPOLINE + _plugin_flags()
        case Variant.PLUGIN_TRACKED:
            return (*_OPTIMISED, "-fcf-protection=branch", *_plugin_flags())


@functools.cache
def _plugin_flags() -> tuple[str, ...]:
    """Flags that make GCC load our plugin, as a user asks for them; builds it first."""
    return tuple(shlex.split(run_command([str(OPTPOLINE), "cflags", "--plugin"])))


def build_once(
    program: str, variant: Variant, inputs: Sequence[Path | str], build: Callable[[Path], Path]
) -> Path:
    """Build a program unless that was done already with the same inputs.

    Args:
        program: Its name.
        variant: How it is built.
        inputs: Files and flags that decide what comes out.
        build: Does it, in the empty directory given; returns what it made.

    Returns:
        The path that ``build`` returned, now or then.
    """
    directory = BUILD / "programs" / program / variant.directory
    stamp = directory.with_suffix(".json")
    digest = hashlib.sha256()
    for item in inputs:
        digest.update(item.read_bytes() if isinstance(item, Path) else item.encode())
        digest.update(b"\0")
    wanted = digest.hexdigest()
    if stamp.exists():
        done = json.loads(stamp.read_text())
        if done["inputs"] == wanted and (BUILD / done["result"]).exists():
            return BUILD / str(done["result"])
    stamp.unlink(missing_ok=True)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    result = build(directory)
    stamp.write_text(json.dumps({"inputs": wanted, "result": str(result.relative_to(BUILD))}))
    return result


def compile_program(
    sources: Sequence[Path],
    *,
    output: Path,
    flags: Sequence[str],
    libraries: Sequence[str] = (),
    compiler: str = "gcc",
) -> Path:
    """Compile C or C++ files, two at a time, and link them.

    Objects and profiles lie beside ``output``, so that compiling again to the same place
    with ``-fprofile-use`` finds the profile that the first result wrote.

    Returns:
        ``output``.
    """
    names = [source.stem for source in sources]
    if len(set(names)) != len(names):
        raise BenchError(f"two sources of {output.name} have the same name")
    objects = [output.parent / f"{name}.o" for name in names]

    def compile_one(source: Path, made: Path) -> None:
        run_command([compiler, *flags, "-c", str(source), "-o", str(made)], cwd=output.parent)

    with ThreadPoolExecutor(_JOBS) as pool:
        list(pool.map(compile_one, sources, objects))
    run_command([compiler, *flags, *map(str, objects), *libraries, "-o", str(output)])
    return output
