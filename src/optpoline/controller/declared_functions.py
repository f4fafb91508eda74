# SPDX-License-Identifier: Apache-2.0
"""Find the function that a static call shall call, as each of its modules reaches it.

A direct branch reaches 2 GiB. A program and its libraries may lie further apart, so a
module that declares a function of another one as a target has an entry of its own for it
in its procedure linkage table, and uses that.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

from optpoline.controller.changes import CallChange
from optpoline.controller.declared_modules import DeclaredModules
from optpoline.controller.declared_sites import DeclaredCall, DeclaredModule
from optpoline.errors import UsageError
from optpoline.model import Addr

__all__ = ["find_functions", "listed"]

_MAX_NAMED = 12
"""Names told in an error."""

_IN_MODULE = re.compile(r"(.+?)(?<!:):(?!:)(.+)")
"""module:function, where the function's name may have :: in it."""

_Part = tuple[DeclaredModule, DeclaredCall]


def find_functions(
    modules: DeclaredModules, name: str, function: str | None, *, is_any: bool = False
) -> CallChange | None:
    """Find a function for a static call, in every module that has that.

    Args:
        modules: The program's modules, as last looked at.
        name: The static call.
        function: A target of it, or ``module:function``; None for what it calls at first.
        is_any: Whether it may be any function of the program: types are not compared then.

    Returns:
        The change, or None if there is no static call of that name.

    Raises:
        UsageError: if there is no such function, or it is not within reach.
    """
    parts = modules.calls_named(name)
    if not parts:
        return None
    return CallChange(
        name=name,
        addrs=tuple(
            (
                part[1].trampoline.addr,
                None if function is None else _find(modules, part, parts, function, is_any),
            )
            for part in parts
        ),
    )


def _find(
    modules: DeclaredModules,
    part: _Part,
    parts: Sequence[_Part],
    function: str,
    is_any: bool,
) -> Addr:
    """Return where one module's static call finds a function."""
    module, call = part
    found: Iterable[Addr] = [addr for one in (part, *parts) for addr in _declared(one, function)]
    if is_any and not found:
        split = _IN_MODULE.fullmatch(function)
        only_in, wanted = (split[1], split[2]) if split else (None, function)
        found = modules.functions_named(wanted, near=module.image.module, only_in=only_in)
    too_far: list[Addr] = []
    for addr in found:
        if call.reaches(addr):
            return addr
        too_far.append(addr)
    path = module.image.module.path
    if too_far:
        raise UsageError(
            f"{function} at {too_far[0]:#x} is more than 2 GiB away from the static call "
            f"{call.call.name} of {path}, beyond any direct branch",
            hint=f"declare it there: STATIC_CALL_TARGET({call.call.name}, {function})",
        )
    if is_any:
        raise UsageError(
            f"no module of the program has a function {function}",
            hint="a stripped module does not name all it has: declare it with STATIC_CALL_TARGET",
        )
    names = [call.default_name, *(target.name for target in call.targets)]
    raise UsageError(
        f"{function} is no declared target of the static call {call.call.name} of {path}, which "
        f"may be {listed(list(dict.fromkeys(names)))}",
        hint="STATIC_CALL_TARGET declares one; --any-function takes any, its type unchecked",
    )


def _declared(part: _Part, function: str) -> Iterator[Addr]:
    """Yield the targets of one name that one module declares, the default included."""
    module, call = part
    split = _IN_MODULE.fullmatch(function) if ":" in function else None
    if split and split[1] in (module.image.module.name, module.image.module.path):
        function = split[2]
    yield from (target.addr for target in call.targets if target.name == function)
    if call.default_name == function:
        yield call.default_addr


def listed(names: Sequence[str]) -> str:
    """Join names for a sentence, the first of many.

    >>> listed(["a", "b"])
    'a, b'
    """
    more = len(names) - _MAX_NAMED
    return ", ".join(names[:_MAX_NAMED]) + (f" and {more} more" if more > 0 else "")
