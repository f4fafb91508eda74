# SPDX-License-Identifier: Apache-2.0
"""Build our GCC plugin for the compiler that is to load it.

A plugin works with exactly the compiler whose headers it was built with. So it is built where it
is used, into the user's cache, under a name that says for which compiler and from which source:
what is there is right, and need not be looked into.
"""

from __future__ import annotations

import hashlib
import shlex
from pathlib import Path

from optpoline.errors import ToolchainError
from optpoline.toolchain.cache import cache_dir, drafted
from optpoline.toolchain.compiler import Compiler, Family, run_compiler

__all__ = ["build_plugin", "find_plugin_headers", "is_plugin_built", "plugin_path"]

_SOURCE_DIR = Path(__file__).parents[1] / "share" / "gcc-plugin"
_NAME = "optpoline.so"
"""Part of the plugin's interface: its options begin with ``-fplugin-arg-optpoline-``."""

OLDEST_MAJOR, NEWEST_MAJOR = 12, 14
"""Releases whose plugin interface the source is written for."""

_FLAGS = ("-std=gnu++14", "-O1", "-fPIC", "-shared", "-fno-rtti", "-fno-exceptions")
"""As the compiler itself was built: it has neither run-time types nor exceptions."""

_BUILD_TIMEOUT_S = 300.0
_PROBE = "gcc-plugin.h"
_WITHOUT = "name such a compiler with --cc, or build with the flags that `optpoline cflags` prints"


def find_plugin_headers(compiler: Compiler) -> Path:
    """Return the directory of the headers that plugins of a compiler are built with.

    Raises:
        ToolchainError: if it takes no plugin of ours, or its headers are not installed.
    """
    if compiler.family is not Family.GCC:
        raise ToolchainError(
            f"the plugin is for GCC, and this is {compiler.name}",
            hint=_WITHOUT,
        )
    if not OLDEST_MAJOR <= compiler.major <= NEWEST_MAJOR:
        raise ToolchainError(
            f"the plugin is for GCC {OLDEST_MAJOR} to {NEWEST_MAJOR}, and this is {compiler.name}",
            hint=_WITHOUT,
        )
    argv = [*compiler.command, "-print-file-name=plugin"]
    answer = run_compiler(argv, timeout_s=_BUILD_TIMEOUT_S).stdout.strip()
    headers = Path(answer) / "include"
    # A compiler that has no such directory answers with the bare name.
    if not Path(answer).is_absolute() or not (headers / _PROBE).is_file():
        raise ToolchainError(
            f"the plugin headers of {compiler.name} are not installed",
            hint=f"install the Debian package gcc-{compiler.major}-plugin-dev",
        )
    return headers


def plugin_path(compiler: Compiler) -> Path:
    """Return where the plugin for a compiler is, or would be, in the user's cache.

    Raises:
        ToolchainError: as ``find_plugin_headers``, or if there is no home directory.
    """
    headers = find_plugin_headers(compiler)
    digest = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in (*_sources(), *sorted(_SOURCE_DIR.glob("*.h")), headers / "plugin-version.h"):
        try:
            digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
        except OSError as error:
            raise ToolchainError(f"{path} cannot be read: {error.strerror}") from error
    directory = f"gcc-{compiler.version}-{digest.hexdigest()[:16]}"
    return cache_dir() / "gcc-plugin" / directory / _NAME


def is_plugin_built(compiler: Compiler) -> bool:
    """Say whether the plugin for a compiler is in the cache."""
    return plugin_path(compiler).is_file()


def build_plugin(compiler: Compiler, *, output: Path | None = None, again: bool = False) -> Path:
    """Build the plugin for a compiler, unless it is there.

    Args:
        compiler: Who is to load it.
        output: Where to put it, or None for the cache.
        again: Whether to build it even if it is there.

    Returns:
        Its path.

    Raises:
        ToolchainError: if it cannot be built; says what is missing. What was there, is there.
    """
    headers = find_plugin_headers(compiler)
    path = plugin_path(compiler) if output is None else output
    if output is None and path.is_file() and not again:
        return path
    with drafted(path) as draft:
        _compile(compiler, headers, draft)
        draft.chmod(0o755)
    return path


def _sources() -> list[Path]:
    """Return the plugin's source files."""
    return sorted(_SOURCE_DIR.glob("*.cc"))


def _compile(compiler: Compiler, headers: Path, output: Path) -> None:
    """Compile and link the plugin with the C++ compiler that belongs to the compiler."""
    command = compiler.cxx_command
    argv = [*command, *_FLAGS, "-isystem", str(headers), *map(str, _sources()), "-o", str(output)]
    try:
        done = run_compiler(argv, timeout_s=_BUILD_TIMEOUT_S)
    except ToolchainError as error:
        raise ToolchainError(
            f"the plugin cannot be built: {error.message}",
            hint=f"install the Debian package g++-{compiler.major}",
        ) from error
    if done.returncode:
        lines = (done.stderr or done.stdout).strip().splitlines() or ["it said nothing"]
        first = next((line for line in lines if "error" in line), lines[-1])
        raise ToolchainError(
            f"the plugin cannot be built with {shlex.join(command)}: {first}",
            hint="compiler and headers must be of one release: on Debian, install "
            f"g++-{compiler.major} and gcc-{compiler.major}-plugin-dev anew",
        )
