# SPDX-License-Identifier: Apache-2.0
"""Thunk bodies and names, as bytes."""

from __future__ import annotations

import pytest

from optpoline.model import Addr
from optpoline.x86.thunks import (
    STACK_OPERAND,
    ThunkShape,
    decode_thunk_body,
    find_thunk_bodies,
    thunk_name_operand,
)

# call over 7 bytes; pause; lfence; jmp back
_HEAD = "e807000000 f390 0faee8 ebf9"
_BODIES = {
    # mov %rax,(%rsp); ret
    f"{_HEAD} 48890424 c3": ("rax", ThunkShape.RETPOLINE, 17),
    # mov %r15,(%rsp); ret
    f"{_HEAD} 4c893c24 c3": ("r15", ThunkShape.RETPOLINE, 17),
    # mov %rbp,(%rsp); ret
    f"{_HEAD} 48892c24 c3": ("rbp", ThunkShape.RETPOLINE, 17),
    # lea 8(%rsp),%rsp; ret
    f"{_HEAD} 488d642408 c3": (STACK_OPERAND, ThunkShape.STACK, 18),
    # Clang: the loop, four int3, then mov %r11,(%rsp); ret
    "e80b000000 f390 0faee8 ebf9 cccccccc 4c891c24 c3": ("r11", ThunkShape.PADDED_RETPOLINE, 21),
    # the same padded with a 4-byte nop
    "e80b000000 f390 0faee8 ebf9 0f1f4000 4c891c24 c3": ("r11", ThunkShape.PADDED_RETPOLINE, 21),
    # call over int3; mov %rdx,(%rsp); ret
    "e801000000 cc 48891424 c3": ("rdx", ThunkShape.RETPOLINE, 11),
    # lfence; jmp *%rbx
    "0faee8 ffe3": ("rbx", ThunkShape.LFENCE, 5),
    # lfence; jmp *%r14
    "0faee8 41ffe6": ("r14", ThunkShape.LFENCE, 6),
}

_NO_BODIES = [
    "",
    "c3",
    _HEAD,
    # label 1 stores 32 bits, beside the return address, or rsp itself
    f"{_HEAD} 890424 c3",
    f"{_HEAD} 4889442408 c3",
    f"{_HEAD} 48892424 c3",
    # it loads instead of storing
    f"{_HEAD} 488b0424 c3",
    # no ret behind
    f"{_HEAD} 48890424 90",
    # ret 8
    f"{_HEAD} 48890424 c20800",
    # the loop is left open, or leaves it
    "e805000000 f390 0faee8 48890424 c3",
    "e807000000 f390 0faee8 eb00 48890424 c3",
    # something is done in it
    "e808000000 f390 0faee8 ebf9 58 48890424 c3",
    # label 1 is in the middle of an instruction
    "e806000000 f390 0faee8 ebf9 48890424 c3",
    # lfence; call *%rax, jmp *(%rax), jmp *%rsp
    "0faee8 ffd0",
    "0faee8 ff20",
    "0faee8 ffe4",
]


@pytest.mark.parametrize(("code", "expected"), _BODIES.items())
def test_bodies(code: str, expected: tuple[str, ThunkShape, int]) -> None:
    body = decode_thunk_body(bytes.fromhex(code), Addr(0x401000))
    assert body is not None
    assert (body.operand, body.shape, body.size) == expected
    assert body.addr == 0x401000


@pytest.mark.parametrize("code", _NO_BODIES)
def test_no_bodies(code: str) -> None:
    assert decode_thunk_body(bytes.fromhex(code), Addr(0x401000)) is None
    assert not list(find_thunk_bodies(bytes.fromhex(code), Addr(0x401000)))


def test_bodies_are_found_at_any_offset() -> None:
    text, starts = bytearray(b"\x90" * 3), []
    for code in _BODIES:
        starts.append(0x7000_0000_0000 + len(text))
        text += bytes.fromhex(code) + b"\xc3\x0f\xae\xe8"[: len(starts) % 5]
    found = find_thunk_bodies(bytes(text), Addr(0x7000_0000_0000))
    assert sorted(body.addr for body in found) == starts


@pytest.mark.parametrize(
    ("name", "operand"),
    [
        ("__x86_indirect_thunk_rax", "rax"),
        ("__x86_indirect_thunk_r8", "r8"),
        ("__llvm_retpoline_r11", "r11"),
        ("__llvm_lvi_thunk_r11", "r11"),
        ("__x86_indirect_thunk_rbx.lto_priv.0", "rbx"),
        ("__x86_indirect_thunk", STACK_OPERAND),
        ("__x86_return_thunk", None),
        ("__x86_return_thunk_rax", None),
        ("__x86_indirect_thunk_eax", None),
        ("__x86_indirect_thunk_rsp", None),
        ("__x86_indirect_thunk_array", None),
        ("main", None),
    ],
)
def test_names(name: str, operand: str | None) -> None:
    assert thunk_name_operand(name) == operand
