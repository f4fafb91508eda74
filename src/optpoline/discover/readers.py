# SPDX-License-Identifier: Apache-2.0
"""Where a thread's count of open brackets is (``optpoline_read_begin``, ``_end``).

Each module that brackets anything has one count a thread, in initial-exec thread-local
storage: at a fixed offset from the thread pointer. The linker knows it, and one noted
instruction tells it, which is never executed::

    48 c7 c0 imm32     mov $offset, %rax              in a program
    48 8b 05 disp32    mov slot(%rip), %rax           in a library: the offset is in the GOT
"""

from __future__ import annotations

from optpoline.discover.declarations import Declarations
from optpoline.discover.image import ModuleImage
from optpoline.errors import NotesError, TargetFault
from optpoline.model import Addr

__all__ = ["READER_COUNT_SIZE", "find_readers_offset"]

READER_COUNT_SIZE = 4
"""Bytes of a thread's count."""

_INSN_SIZE = 7
_OPCODE_SIZE = 3
_LOAD_IMMEDIATE = b"\x48\xc7\xc0"
_LOAD_SLOT = b"\x48\x8b\x05"
_SLOT_SIZE = 8


def find_readers_offset(image: ModuleImage, declared: Declarations) -> int | None:
    """Return the offset of a thread's count from its thread pointer, usually negative.

    Args:
        image: The module, mapped in a process: the dynamic linker fills the slot.
        declared: What it declares.

    Returns:
        The offset in bytes, or None if the module brackets nothing.

    Raises:
        NotesError: if the noted instruction is none of the two.
    """
    addr = declared.readers
    if addr is None:
        return None
    try:
        code = image.read(addr, _INSN_SIZE)
        number = int.from_bytes(code[_OPCODE_SIZE:], "little", signed=True)
        if code.startswith(_LOAD_IMMEDIATE):
            return number
        if code.startswith(_LOAD_SLOT):
            slot = image.read(Addr(addr + _INSN_SIZE + number), _SLOT_SIZE)
            return int.from_bytes(slot, "little", signed=True)
    except TargetFault:
        code = b""
    raise NotesError(
        f"{image.module.path} declares that the count of open brackets is told at {addr:#x}, "
        f"where the bytes {code.hex(' ') or 'cannot be read'} tell none"
    )
