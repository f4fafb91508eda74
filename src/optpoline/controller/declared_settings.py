# SPDX-License-Identifier: Apache-2.0
"""What a program's keys and static calls were set to, in words, for those who only look."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial

from optpoline.controller.declared_sites import DeclaredModule, read_declared_module
from optpoline.controller.declared_state import summarise_calls, summarise_keys
from optpoline.errors import NotesError, TargetFault
from optpoline.model import Module
from optpoline.patch.text import Text
from optpoline.process.memory import RemoteMemory
from optpoline.process.modules import list_modules

__all__ = ["describe_settings", "describe_torn", "read_declared_modules", "read_settings"]

_MAX_LOOKS = 32
"""How often to look at modules some of which are unloaded while they are looked at."""


def read_declared_modules(
    memory: RemoteMemory, modules: Sequence[Module]
) -> tuple[list[DeclaredModule], list[str]]:
    """Return the modules that declare anything, and a sentence for each that cannot be read."""
    found: list[DeclaredModule] = []
    problems: list[str] = []
    for module in modules:
        try:
            declared = read_declared_module(memory.pid, module, memory)
        except NotesError as error:
            problems.append(str(error))
        except TargetFault:
            problems.append(f"{module.path} was unloaded meanwhile")
        else:
            found += [declared] if declared is not None else []
    return found, problems


def read_settings(memory: RemoteMemory) -> tuple[str, ...]:
    """Return what is not as it begins, such as "trace=on", as the commands take it.

    Nothing is stopped. A module that cannot be read has none; where modules come and go all
    the time nothing is told.
    """
    for _ in range(_MAX_LOOKS):
        modules, _problems = read_declared_modules(memory, list_modules(memory.pid, memory=memory))
        with suppress(TargetFault):  # unloaded meanwhile
            return tuple(describe_settings(modules, memory))
    return ()


def describe_settings(modules: Sequence[DeclaredModule], text: Text) -> Iterator[str]:
    """Yield what is not as it begins.

    Raises:
        TargetFault: if a module was unloaded meanwhile.
    """
    for key in summarise_keys(modules, text):
        if key.is_set:
            yield f"{key.name}={key.state.value}"
    for call in summarise_calls(modules, text, partial(_symbol_at, modules)):
        if call.is_set:
            yield f"{call.name}={call.target or 'mixed'}"


def _symbol_at(modules: Sequence[DeclaredModule], addr: int) -> str | None:
    """Name a function of a module that declares anything."""
    for module in modules:
        if module.image.is_code(addr):
            named = module.image.symbols.name_at(addr)
            return named[0] if named is not None and not named[1] else None
    return None


def describe_torn(modules: Sequence[DeclaredModule], text: Text) -> Iterator[tuple[int, str]]:
    """Yield address and sentence for each thing that was left half changed.

    Raises:
        TargetFault: if a module was unloaded meanwhile.
    """
    for module in modules:
        keys = {key.key.name: key.key.addr for key in module.keys}
        for one in summarise_keys([module], text):
            if one.is_torn:
                sentence = f"the branches on the static key {one.name} contradict its count"
                yield keys[one.name], sentence
        calls = {call.call.name: call.call.addr for call in module.calls}
        for call in summarise_calls([module], text, hex):
            if call.is_torn:
                sentence = f"the calls of the static call {call.name} contradict its trampoline"
                yield calls[call.name], sentence
