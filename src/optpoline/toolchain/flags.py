# SPDX-License-Identifier: Apache-2.0
"""Flags that make every indirect branch of a program one that can be made direct.

A site must be at least as long as ``call rel32``. There are two ways to that: the plugin pads
branches, and notes where they are; retpolines are such calls by themselves. Both go together.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from pathlib import Path

from optpoline.errors import UsageError
from optpoline.toolchain.compiler import Compiler, Family

__all__ = ["Form", "FormCost", "Mode", "compile_flags", "form_costs", "link_flags"]

_SHARE_DIR = Path(__file__).parents[1] / "share"
_INCLUDE_DIR = _SHARE_DIR / "include"
_THUNKS = _SHARE_DIR / "thunks" / "optpoline_thunks.S"

_NO_ENFORCEMENT = "-fcf-protection=none"
"""GCC rejects retpolines together with -fcf-protection=full, which some distributions make the
default; retpolines return to where no call was, which shadow stacks forbid."""

_RETPOLINE_FLAGS = {
    Family.GCC: ("-mindirect-branch=thunk-extern", "-mindirect-branch-register"),
    Family.CLANG: ("-mretpoline", "-mretpoline-external-thunk"),
}


class Form(Enum):
    """What an indirect branch becomes."""

    MARKED = "plugin"
    MARKED_RETPOLINE = "plugin, retpoline"
    RETPOLINE = "retpoline"

    @property
    def has_plugin(self) -> bool:
        """Whether the plugin is used."""
        return self is not Form.RETPOLINE

    @property
    def has_thunks(self) -> bool:
        """Whether branches go through thunks, which have to be linked."""
        return self is not Form.MARKED


class Mode(Enum):
    """Which branches the plugin lets a controller change."""

    OPT_OUT = "opt-out"
    OPT_IN = "opt-in"


@dataclass(frozen=True, slots=True, kw_only=True)
class FormCost:
    """What a form costs as long as nothing is promoted.

    Attributes:
        form: The form.
        site: The site, as assembly.
        cost: What it costs beside the plain branch that it replaces.
    """

    form: Form
    site: str
    cost: str


def compile_flags(
    compiler: Compiler, form: Form, *, plugin: Path | None = None, mode: Mode = Mode.OPT_OUT
) -> tuple[str, ...]:
    """Return the flags to compile with.

    Args:
        compiler: The compiler they are for.
        form: What indirect branches are to become.
        plugin: The plugin, for forms that have it.
        mode: What the plugin lets a controller change.

    Raises:
        UsageError: if the form needs a plugin and there is none.
    """
    flags = [f"-I{_INCLUDE_DIR}"]
    flags += _plugin_flags(form, plugin, mode)
    if form.has_thunks:
        flags += [*_RETPOLINE_FLAGS[compiler.family], _NO_ENFORCEMENT]
    return tuple(flags)


def link_flags(
    form: Form, *, plugin: Path | None = None, mode: Mode = Mode.OPT_OUT
) -> tuple[str, ...]:
    """Return the flags to link with: thunks, and the plugin for link-time optimisation.

    Raises:
        UsageError: if the form needs a plugin and there is none.
    """
    # With -flto, code is made at link time. Otherwise the linker's driver ignores the plugin.
    flags = _plugin_flags(form, plugin, mode)
    if form.has_thunks:
        flags.append(str(_THUNKS))
    return tuple(flags)


def form_costs() -> tuple[FormCost, ...]:
    """Return what each form costs; docs/plugin.md has the figures and how they were taken."""
    return (
        FormCost(
            form=Form.MARKED,
            site="cs cs cs call *%rax",
            cost="the same instructions; up to 3 bytes of code a site, 60 of notes",
        ),
        FormCost(
            form=Form.RETPOLINE,
            site="call __x86_indirect_thunk_rax",
            cost="10 to 70 cycles, until it is promoted; the program's environment may say"
            " OPTPOLINE_THUNKS=lfence (fewer where lfence is cheap, and less safe) or plain (next"
            " to none, and unsafe unless the CPU protects indirect branches)",
        ),
        FormCost(
            form=Form.MARKED_RETPOLINE,
            site="call __x86_indirect_thunk_rax",
            cost="as before, and 60 bytes of notes a site",
        ),
    )


def _plugin_flags(form: Form, plugin: Path | None, mode: Mode) -> list[str]:
    """Return the flags that make GCC load the plugin."""
    if not form.has_plugin:
        return []
    if plugin is None:
        raise UsageError(f"the form {form.value!r} needs a plugin")
    flags = [f"-fplugin={plugin}"]
    if mode is not Mode.OPT_OUT:
        flags.append(f"-fplugin-arg-{plugin.stem}-mode={mode.value}")
    return flags
