# SPDX-License-Identifier: Apache-2.0
"""Where build systems find us: pkg-config packages, and a CMake package.

The header's package is a file of ours that knows no compiler, and where it lies (``${pcfiledir}``).
Thunks and plugin go with one compiler, and pkg-config cannot ask which that is: their packages are
written into the user's cache, from the flags that ``optpoline cflags`` would print.
The CMake package asks CMake, so it is a file of ours as a whole.
"""

from __future__ import annotations

import hashlib
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from optpoline.errors import ToolchainError
from optpoline.toolchain.cache import cache_dir, drafted
from optpoline.toolchain.compiler import Compiler
from optpoline.toolchain.flags import Form, Mode, compile_flags, link_flags

__all__ = ["CMAKE_PREFIX", "pkg_config_path"]

_SHARE_DIR = Path(__file__).parents[1] / "share"
_PKG_CONFIG_DIR = _SHARE_DIR / "pkgconfig"
_HEADER_PACKAGE = _PKG_CONFIG_DIR / "optpoline.pc"

CMAKE_PREFIX = _SHARE_DIR / "cmake" / "optpoline"
"""For CMAKE_PREFIX_PATH, or for optpoline_DIR: it holds the configuration file itself, and nothing
else that CMake could find by mistake."""

_PACKAGES = {
    Form.RETPOLINE: ("optpoline-thunks", "retpolines through thunks of optpoline"),
    Form.MARKED: ("optpoline-plugin", "the GCC plugin that marks indirect branches"),
}


def pkg_config_path(
    compiler: Compiler, *, plugin: Path | None = None, mode: Mode = Mode.OPT_OUT
) -> tuple[Path, ...]:
    """Return the directories of our packages, written now as far as they depend on a compiler.

    Args:
        compiler: The compiler that the packages are for.
        plugin: Its plugin, or None for no package of that.
        mode: What the plugin lets a controller change.

    Raises:
        ToolchainError: if a package cannot be written.
    """
    release = _read_release()
    forms = (Form.RETPOLINE,) if plugin is None else (Form.RETPOLINE, Form.MARKED)
    texts: dict[str, str] = {}
    for form in forms:
        flags = compile_flags(compiler, form, plugin=plugin, mode=mode)
        # The header's flag is that of the package that this one requires.
        compiling = [flag for flag in flags if not flag.startswith("-I")]
        linking = link_flags(form, plugin=plugin, mode=mode)
        name, description = _PACKAGES[form]
        texts[f"{name}.pc"] = _format_package(name, description, release, compiling, linking)
    digest = hashlib.sha256("\0".join(texts.values()).encode()).hexdigest()[:16]
    directory = cache_dir() / "pkgconfig" / digest
    for file_name, text in texts.items():
        if not (directory / file_name).is_file():
            with drafted(directory / file_name) as draft:
                draft.write_text(text)
                draft.chmod(0o644)
    return (_PKG_CONFIG_DIR, directory)


def _read_release() -> str:
    """Return our release, from the one place where it stands."""
    try:
        text = _HEADER_PACKAGE.read_text()
    except OSError as error:
        raise ToolchainError(f"{_HEADER_PACKAGE} cannot be read: {error.strerror}") from error
    found = re.search(r"^Version: (.+)$", text, re.MULTILINE)
    if found is None:
        raise ToolchainError(f"{_HEADER_PACKAGE} is damaged", hint="install optpoline anew")
    return found[1]


def _format_package(
    name: str, description: str, release: str, compiling: Sequence[str], linking: Sequence[str]
) -> str:
    """Return the text of a package that brings the header's along."""
    lines = [
        f"Name: {name}",
        f"Description: {description}",
        f"Version: {release}",
        f"Requires: optpoline = {release}",
        f"Cflags: {_quote(compiling)}",
        f"Libs: {_quote(linking)}",
    ]
    return "\n".join(lines) + "\n"


def _quote(flags: Sequence[str]) -> str:
    """Quote flags for pkg-config, which reads them as a shell would, and has ``$$`` for ``$``.

    >>> _quote(["-fplugin=/a b/optpoline.so", "-O2"])
    "'-fplugin=/a b/optpoline.so' -O2"
    """
    return shlex.join(flags).replace("$", "$$")
