# SPDX-License-Identifier: Apache-2.0
"""Which code of a module may be changed while it runs, for analyses that follow code.

What an analysis proves of code has to hold after a key was switched and a static call was
given another target, too, because nobody asks again then. So a branch on a key leads both
ways, and where a static call leads nobody knows.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from optpoline.discover.declared import read_declarations
from optpoline.discover.image import ModuleImage
from optpoline.errors import NotesError, TargetFault
from optpoline.model import Addr
from optpoline.x86.decode import Insn, decode_one

__all__ = ["Changeable", "read_changeable"]

_TRAMPOLINE_SIZE = 5


@dataclass(frozen=True, slots=True, kw_only=True)
class Changeable:
    """What may be changed in one module.

    Attributes:
        forks: Instructions that fall through or jump, and where both ways lead.
        calls: Where static calls lead, or may: trampolines and functions.
    """

    forks: Mapping[Addr, tuple[Addr, ...]] = field(default_factory=dict)
    calls: frozenset[Addr] = frozenset()


def read_changeable(image: ModuleImage) -> Changeable:
    """Read a module's notes; where they are damaged nothing can be changed, by anybody."""
    try:
        declared = read_declarations(image)
        # As in the text that analyses follow, which was read once: a call that leads to X there
        # ends a run at X, whatever the trampoline leads to by now.
        trampolines = {call.addr: _decode(image, call.addr) for call in declared.calls}
    except (NotesError, TargetFault):
        return Changeable()
    calls = {*trampolines, *(target.addr for target in declared.targets)}
    # A call may lead to its target of now, past the trampoline.
    calls |= {jump.target for jump in trampolines.values() if jump and jump.target is not None}
    return Changeable(
        forks={one.addr: (one.target, Addr(one.addr + one.size)) for one in declared.branches},
        calls=frozenset(calls),
    )


def _decode(image: ModuleImage, addr: Addr) -> Insn | None:
    """Decode a trampoline."""
    text = image.text_at(addr)
    return decode_one(text.code_at(addr, _TRAMPOLINE_SIZE), addr) if text is not None else None
