# SPDX-License-Identifier: Apache-2.0
"""Where a thread's count of open brackets is, by the one instruction that tells."""

from __future__ import annotations

from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.discover.declarations import Declarations
from optpoline.discover.image import ModuleImage
from optpoline.discover.readers import find_readers_offset
from optpoline.errors import NotesError, TargetFault
from optpoline.model import Addr

AT = Addr(0x1000)
SLOT = 0x2000


def image(code: bytes, slot: bytes = b"") -> ModuleImage:
    """Return a module that has this instruction, and this slot."""

    def read(addr: int, size: int) -> bytes:
        held = {int(AT): code, SLOT: slot}.get(addr, b"")
        if len(held) < size:
            raise TargetFault(addr, size)
        return held[:size]

    return cast(ModuleImage, SimpleNamespace(read=read, module=SimpleNamespace(path="/bin/a")))


def test_program_has_it_in_the_instruction() -> None:
    code = bytes.fromhex("48c7c0fcffffff")  # mov $-4, %rax
    assert find_readers_offset(image(code), Declarations(readers=AT)) == -4


def test_library_has_it_in_a_slot() -> None:
    code = bytes.fromhex("488b05") + (SLOT - AT - 7).to_bytes(4, "little")
    slot = (-136).to_bytes(8, "little", signed=True)
    assert find_readers_offset(image(code, slot), Declarations(readers=AT)) == -136


def test_module_without_brackets_has_none() -> None:
    assert find_readers_offset(image(b""), Declarations()) is None


@pytest.mark.parametrize("code", ["90909090909090", "488b0500000000", "48c7"])
def test_other_bytes_are_an_error(code: str) -> None:
    with pytest.raises(NotesError, match="/bin/a declares that the count"):
        find_readers_offset(image(bytes.fromhex(code)), Declarations(readers=AT))
