# SPDX-License-Identifier: Apache-2.0
"""Find the thunks of one module: by symbol, and by body where there is none.

A body in the middle of a function is ``thunk-inline``: its own function goes
through it, and no branch to it is a site. It is counted, so that the user can
be told why such a program has none.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from optpoline.discover.functions import FunctionIndex, Span
from optpoline.discover.symbols import SymbolTable
from optpoline.discover.text import Text
from optpoline.model import Addr, Thunk, ThunkFlavour
from optpoline.x86.decode import AddrArray, scan_branches
from optpoline.x86.thunks import (
    MAX_BODY_SIZE,
    THUNK_NAME_MARKS,
    ThunkBody,
    ThunkShape,
    decode_thunk_body,
    find_thunk_bodies,
    flavour_of,
    has_inline_form,
    thunk_name_operand,
)

__all__ = ["ThunkScan", "find_thunks"]

_CLANG_PREFIX = "__llvm_"


@dataclass(frozen=True, slots=True, kw_only=True)
class ThunkScan:
    """The thunks of one module.

    Attributes:
        thunks: In address order, one for each address.
        bodies: The addresses their code covers.
        n_inline: Number of ``thunk-inline`` bodies.
    """

    thunks: tuple[Thunk, ...]
    bodies: tuple[Span, ...]
    n_inline: int

    @property
    def addrs(self) -> AddrArray:
        """Their addresses, sorted."""
        return np.array([thunk.addr for thunk in self.thunks], dtype=np.int64)


def find_thunks(
    texts: Sequence[Text], symbols: SymbolTable, functions: Callable[[], FunctionIndex]
) -> ThunkScan:
    """Find the thunks of a module.

    Args:
        texts: All its text.
        symbols: Its symbols, of whichever table it has.
        functions: Tells where its functions are; called only where that matters, for it
            is most of the work in a module without thunks.
    """
    found: dict[Addr, tuple[Thunk, Span]] = {}
    for name, addr, size in symbols.find_containing(THUNK_NAME_MARKS):
        text = next((text for text in texts if addr in text), None)
        operand = thunk_name_operand(name)
        if text is None or operand is None:
            continue
        body = decode_thunk_body(text.code_at(addr, MAX_BODY_SIZE), addr)
        thunk = _named_thunk(name, addr, operand, body)
        end = Addr(addr + (body.size if body else size))
        found.setdefault(addr, (thunk, Span(addr, end)))
    n_inline = 0
    for text in texts:
        for body in find_thunk_bodies(text.code, text.addr):
            if body.addr in found or body.shape is ThunkShape.STACK:
                continue  # a STACK body without a name is a return thunk
            if _is_inline(body, text, texts, functions()):
                n_inline += 1
                continue
            flavour = flavour_of(body.shape)
            thunk = Thunk(addr=body.addr, operand=body.operand, flavour=flavour, symbol=None)
            found[body.addr] = (thunk, Span(body.addr, Addr(body.addr + body.size)))
    ordered = [found[addr] for addr in sorted(found)]
    return ThunkScan(
        thunks=tuple(thunk for thunk, _ in ordered),
        bodies=tuple(span for _, span in ordered),
        n_inline=n_inline,
    )


def _named_thunk(name: str, addr: Addr, operand: str, body: ThunkBody | None) -> Thunk:
    """Describe a thunk that has a symbol; what its body does counts more than its name."""
    if body is None:
        flavour = ThunkFlavour.EXTERN
    elif name.startswith(_CLANG_PREFIX):
        flavour = ThunkFlavour.CLANG
    else:
        flavour = flavour_of(body.shape)
    if body is not None:
        operand = body.operand
    return Thunk(addr=addr, operand=operand, flavour=flavour, symbol=name)


def _is_inline(
    body: ThunkBody, text: Text, texts: Sequence[Text], functions: FunctionIndex
) -> bool:
    """Say whether an unnamed body is part of the one function that uses it."""
    if functions.is_start(body.addr):
        return False
    if functions.is_inside(body.addr):
        return True
    if has_inline_form(text.code, body.addr - text.addr, body.size):
        return True
    # Nothing is known about the functions around: a thunk is what gets branched to.
    target = np.array([body.addr], dtype=np.int64)
    return all(scan_branches(each.array, each.addr, target).size == 0 for each in texts)
