# SPDX-License-Identifier: Apache-2.0
"""Labels: addresses inside functions that a jump through a register may reach.

A label's address is stored in data (a table of ``&&label``), relocated there,
or taken by an instruction. More addresses are collected than are labels; one at
which no instruction begins is none.

Limits: a table of differences between labels holds no address and is not seen. In a
position-independent file that is not loaded, small numbers look like addresses: there
only relocations and rip-relative instructions count, and DT_RELR is not decoded.
"""

from __future__ import annotations

import logging

import numpy as np

from optpoline.discover.functions import Span
from optpoline.discover.image import ModuleImage
from optpoline.discover.relocations import read_relocations
from optpoline.errors import TargetFault
from optpoline.model import Addr
from optpoline.x86.decode import (
    AddrArray,
    find_boundaries,
    scan_call_targets,
    scan_code_pointers,
)

__all__ = ["LabelIndex"]

_logger = logging.getLogger(__name__)


class LabelIndex:
    """The labels of one module, by function.

    Args:
        image: The module.
    """

    def __init__(self, image: ModuleImage) -> None:
        """Collect every address that is taken and sort it to its function."""
        self._image = image
        self._taken = _collect_taken_addrs(image)
        self._by_function: dict[Span, set[int]] = {}
        self._homeless: list[Addr] = []
        is_start = np.isin(self._taken, image.functions.starts())
        for addr in self._taken[~is_start].tolist():
            if image.is_in_plt(addr):
                continue
            span = image.functions.find(addr)
            if span is not None:
                self._by_function.setdefault(span, set()).add(addr)
            elif image.is_in_text_section(addr):
                self._homeless.append(Addr(addr))
        self._shared: tuple[Addr, ...] | None = None
        self._called: AddrArray | None = None

    def of_function(self, span: Span) -> tuple[Addr, ...]:
        """Return the labels that may belong to the function at ``span``.

        Besides those in it, these are the labels in no known function, and
        those in code that may be a function's cold part.
        """
        if self._shared is None:
            fragments = [part for part in self._by_function if self._may_be_fragment(part)]
            parts = [label for part in fragments for label in self._labels_in(part)]
            self._shared = (*self._homeless, *parts)
        return (*self._labels_in(span), *self._shared)

    def _labels_in(self, span: Span) -> tuple[Addr, ...]:
        """Return the labels of one function at which an instruction begins."""
        wanted = self._by_function.get(span)
        text = self._image.text_at(span.start)
        if not wanted or text is None:
            return ()
        code = text.code_at(span.start, span.end - span.start)
        return tuple(Addr(addr) for addr in sorted(find_boundaries(code, span.start, wanted)))

    def _may_be_fragment(self, span: Span) -> bool:
        """Say whether a range may be the cold part of some function.

        Symbols tell. Without them: nobody calls a cold part, takes its address
        or exports it, as is done with functions.
        """
        named = self._image.symbols.name_at(span.start)
        if named is not None and named[1] == 0:
            return self._image.is_cold_start(span.start)
        if not self._image.is_stripped:
            return True
        if self._called is None:
            called = [scan_call_targets(text.array, text.addr) for text in self._image.texts]
            self._called = np.unique(np.concatenate(called))
        return not _has(self._taken, span.start) and not _has(self._called, span.start)


def _has(addrs: AddrArray, addr: Addr) -> bool:
    """Say whether an address is in a sorted array."""
    index = int(np.searchsorted(addrs, addr))
    return index < addrs.size and int(addrs[index]) == addr


def _collect_taken_addrs(image: ModuleImage) -> AddrArray:
    """Collect each address of the module's text that data or instructions hold."""
    is_loaded = bool(image.module.mappings) or not image.facts.is_position_independent
    found = [
        scan_code_pointers(text.array, text.addr, with_absolute=is_loaded) for text in image.texts
    ]
    found.append(read_relocations(image).pointers(image))
    for addr, size in image.data_ranges() if is_loaded else ():
        # Compilers align tables of labels; only whole words are looked at.
        start = addr + -addr % 8
        n_words = max(addr + size - start, 0) // 8
        try:
            found.append(np.frombuffer(image.read(Addr(start), n_words * 8), dtype="<i8"))
        except TargetFault as error:
            _logger.info("labels of %s: %s", image.module.path, error)
    inside = [
        each[(each >= text.addr) & (each < text.end)] for each in found for text in image.texts
    ]
    return np.unique(np.concatenate(inside)) if inside else np.zeros(0, dtype=np.int64)
