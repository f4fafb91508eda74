# SPDX-License-Identifier: Apache-2.0
"""The modules of a running program that declare static calls and keys, kept up to date."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

from optpoline.controller.declared_sites import (
    DeclaredCall,
    DeclaredModule,
    read_declared_module,
)
from optpoline.controller.target import Target
from optpoline.discover import ModuleImage
from optpoline.errors import OptpolineError, TargetFault, UsageError
from optpoline.model import Addr, Mapping, Module
from optpoline.process.modules import list_modules, open_module

__all__ = ["DeclaredModules"]

_MAX_LOOKS = 32
"""How often to look at modules some of which are unloaded while they are looked at."""

_Found = TypeVar("_Found")


class DeclaredModules:
    """What the modules of a program declare.

    Args:
        target: The program.
    """

    def __init__(self, target: Target) -> None:
        """Read nothing yet."""
        self._target = target
        self._maps: tuple[Mapping, ...] = ()
        self._modules: dict[Module, DeclaredModule | None] = {}
        self._images: dict[Module, ModuleImage] = {}
        self.declaring: tuple[DeclaredModule, ...] = ()
        """Those that declare anything, as of the last ``refresh``."""
        self.key_names: frozenset[str] = frozenset()
        """What their keys are called."""
        self._calls: dict[str, list[tuple[DeclaredModule, DeclaredCall]]] = {}

    def refresh(self) -> Sequence[DeclaredModule]:
        """Look for modules that were loaded or unloaded since; return those that declare.

        Raises:
            NotesError: if a module's notes are damaged, contradict its text, or are too new.
            ProcessGone: if the program is.
        """
        maps = self._target.read_maps()
        if maps != self._maps:
            self._maps = maps
            self._modules = dict(self._read_modules())
            self._images = {m: image for m, image in self._images.items() if m in self._modules}
            self.declaring = tuple(one for one in self._modules.values() if one is not None)
            self.key_names = frozenset(k.key.name for one in self.declaring for k in one.keys)
            self._calls = {}
            for one in self.declaring:
                for call in one.calls:
                    self._calls.setdefault(call.call.name, []).append((one, call))
        return self.declaring

    def look(self, summarise: Callable[[Sequence[DeclaredModule]], _Found]) -> _Found:
        """Return what a function says of the modules that declare, all of which are there.

        Raises:
            TargetFault: if modules come and go all the time.
        """
        for _ in range(_MAX_LOOKS - 1):
            with suppress(TargetFault):
                return summarise(self.refresh())
        return summarise(self.refresh())

    def _read_modules(self) -> Iterator[tuple[Module, DeclaredModule | None]]:
        """Yield the modules there are, and what each declares; those known are not read again.

        Raises:
            NotesError: if a module's notes are damaged, contradict its text, or are too new.
        """
        pid, memory = self._target.pid, self._target.memory
        for module in list_modules(pid, memory=memory):
            if module in self._modules:
                yield module, self._modules[module]
                continue
            try:
                yield module, read_declared_module(pid, module, memory)
            except TargetFault:
                # Unloaded meanwhile. One like it may be loaded, and the map look as it did.
                self._maps = ()

    def calls_named(self, name: str) -> Sequence[tuple[DeclaredModule, DeclaredCall]]:
        """Return the static calls of a name, at most one a module."""
        return self._calls.get(name, ())

    @property
    def call_names(self) -> frozenset[str]:
        """What the static calls are called."""
        return frozenset(self._calls)

    def symbol_at(self, addr: int) -> str | None:
        """Name code anywhere in the program: ``name`` or ``name+0x12``, or None."""
        for module in self._modules:
            if module.start <= addr < module.end:
                image = self._image(module)
                named = image.symbols.name_at(addr) if image is not None else None
                return named and (f"{named[0]}+{named[1]:#x}" if named[1] else named[0])
        return None

    def functions_named(self, name: str, *, near: Module, only_in: str | None) -> Iterator[Addr]:
        """Yield the functions of a name by the symbol tables, those of one module first.

        Args:
            name: As in the symbol table.
            near: The module whose functions come first.
            only_in: Path or last component of the only module to look in, None for all.

        Raises:
            UsageError: if a module that is met has several of the name, or one that only
                chooses a function.
        """
        for module in sorted(self._modules, key=lambda one: (one != near, one.start)):
            if only_in is not None and only_in not in (module.name, module.path):
                continue
            image = self._image(module)
            found = image.symbols.find_functions(name) if image is not None else []
            addrs = {addr: is_chosen for addr, is_chosen in found if self._target.is_code(addr)}
            if len(addrs) > 1:
                places = " and ".join(f"{addr:#x}" for addr in sorted(addrs)[:2])
                raise UsageError(
                    f"{module.path} has several functions {name} (at {places})",
                    hint="declare the one that is meant, with STATIC_CALL_TARGET",
                )
            for addr, is_chosen in addrs.items():
                if is_chosen:
                    raise UsageError(
                        f"{name} of {module.path} is no function, but chooses one when the program "
                        "is loaded (an indirect function)",
                        hint="name the function it chooses, or declare it with STATIC_CALL_TARGET",
                    )
                yield addr

    def _image(self, module: Module) -> ModuleImage | None:
        """Return the image of a module, with its symbols; None if it is none of our kind."""
        known = self._modules[module]
        if known is not None:
            return known.image
        if module not in self._images:
            try:
                self._images[module] = self._read_image(module)
            except OptpolineError:
                return None
        return self._images[module]

    def _read_image(self, module: Module) -> ModuleImage:
        """Read the image of a module that declares nothing."""
        stream = open_module(self._target.pid, module)
        try:
            return ModuleImage.from_process(module, self._target.memory, stream)
        finally:
            if stream is not None:
                stream.close()
