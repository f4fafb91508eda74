# SPDX-License-Identifier: Apache-2.0
"""The documents of ``cflags``, ``ldflags`` and ``plugin build``; docs/json.md describes them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from optpoline.report.json_document import SCHEMA_VERSION, JsonObject
from optpoline.toolchain.compiler import Compiler

__all__ = ["directories_document", "flags_document", "plugin_document"]


def flags_document(command: str, compiler: Compiler, flags: Sequence[str]) -> JsonObject:
    """Return what ``cflags`` and ``ldflags`` write."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "compiler": _compiler_object(compiler),
        "flags": list(flags),
    }


def directories_document(directories: Sequence[Path]) -> JsonObject:
    """Return what ``cflags`` writes where it is asked for packages."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "cflags",
        "directories": [str(directory) for directory in directories],
    }


def plugin_document(compiler: Compiler, path: Path) -> JsonObject:
    """Return what ``plugin build`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "plugin",
        "compiler": _compiler_object(compiler),
        "path": str(path),
    }


def _compiler_object(compiler: Compiler) -> JsonObject:
    """Describe a compiler."""
    return {
        "argv": list(compiler.command),
        "family": compiler.family.value,
        "version": compiler.version,
    }
