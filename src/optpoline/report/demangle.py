# SPDX-License-Identifier: Apache-2.0
"""Turn symbol names into names for people, short enough for a terminal.

Only text meant for people is demangled; machine-readable output keeps the
symbol table's spelling. The demangler is imported when the first mangled name
turns up: most programs are C and never need it.
"""

from __future__ import annotations

from functools import lru_cache

__all__ = ["readable_name", "shorten_middle"]

ELLIPSIS = "…"

_CACHE_SIZE = 4096
"""Names kept; a report shows far fewer."""


@lru_cache(maxsize=_CACHE_SIZE)
def readable_name(name: str) -> str:
    """Demangle ``symbol`` or ``symbol+0x12``; other names come back as they are.

    >>> readable_name("main+0x12")
    'main+0x12'
    >>> readable_name("_ZN4Base3runEi+0x8")
    'Base::run(int)+0x8'
    """
    symbol, plus, offset = name.partition("+0x")
    if not symbol.startswith(("_Z", "__Z")):
        return name
    import cpp_demangle

    try:
        readable: str = cpp_demangle.demangle(symbol)
    except ValueError:
        return name
    return readable + plus + offset


def shorten_middle(text: str, width: int) -> str:
    """Cut the middle out of a text that is wider than ``width`` characters.

    >>> shorten_middle("abcdefghij", 7)
    'abc…hij'
    """
    if len(text) <= width:
        return text
    if width <= 1:
        return ELLIPSIS[:width]
    tail_size = (width - 1) // 2
    head_size = width - 1 - tail_size
    return text[:head_size] + ELLIPSIS + (text[-tail_size:] if tail_size else "")
