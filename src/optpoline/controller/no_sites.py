# SPDX-License-Identifier: Apache-2.0
"""Say what a program without a retpoline site has instead, and what that means."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.controller.target import LoadedModule
from optpoline.controller.wording import count_of
from optpoline.discover import count_plain_indirect
from optpoline.errors import NoSites
from optpoline.process.procfs import read_status

__all__ = ["no_sites_error", "no_sites_hint"]

_PLAIN = (
    "it was not built with retpolines (-mindirect-branch=thunk): there is nothing to gain, but "
    "for what our compiler plugin marks (optpoline cflags --plugin)"
)
_INLINE = "inline retpolines cannot be redirected; build with -mindirect-branch=thunk"


def no_sites_error(pid: int, modules: Sequence[LoadedModule]) -> NoSites:
    """Return the error to raise.

    Args:
        pid: The program.
        modules: All that is mapped into it.

    Raises:
        ProcessGone: if the program is.
    """
    n_plain = sum(count_plain_indirect(loaded.image) for loaded in modules if loaded.module.is_main)
    n_inline = sum(loaded.scan.n_inline for loaded in modules)
    has_thunks = any(loaded.scan.thunks for loaded in modules)
    return NoSites(
        f"process {pid} ({read_status(pid).name}) has no retpoline site in its "
        f"{count_of(len(modules), 'module')} "
        f"({count_of(n_plain, 'plain indirect branch', 'es')} in the executable, "
        f"{count_of(n_inline, 'inline retpoline')})",
        hint=no_sites_hint(n_inline=n_inline, has_thunks=has_thunks),
    )


def no_sites_hint(*, n_inline: int, has_thunks: bool) -> str | None:
    """Return what to make of a program or file without sites; None if that cannot be told.

    Args:
        n_inline: Retpolines in it that are written out in place.
        has_thunks: Whether there is a thunk in it.
    """
    if n_inline:
        return _INLINE
    return None if has_thunks else _PLAIN
