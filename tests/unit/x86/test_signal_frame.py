# SPDX-License-Identifier: Apache-2.0
"""Signal frames: every offset against the kernel's structs, for each kind of XSAVE image."""

from __future__ import annotations

import struct

import pytest

from optpoline.errors import UnsupportedTarget
from optpoline.x86.registers import Registers, decode_registers
from optpoline.x86.signal_frame import (
    FRAME_PC_WORDS,
    FRAME_SEGMENTS,
    FRAME_SEGMENTS_MASK,
    FRAME_SP_WORDS,
    RED_ZONE_SIZE,
    SignalFrame,
    encode_signal_frame,
)
from optpoline.x86.xsave import XsaveLayout, plan_xsave_layout

REGS = decode_registers(struct.pack("<27Q", *range(1000, 1027)))._replace(
    rsp=0x7FFF_0000_1238, cs=0x33, ss=0x2B
)
AVX = plan_xsave_layout(7, {2: (576, 256)})
AMX = plan_xsave_layout(
    0x602E7,
    {2: (576, 256), 5: (1088, 64), 6: (1152, 512), 7: (1664, 1024), 9: (2688, 8),
     17: (2752, 64), 18: (2816, 8192)},
)  # fmt: skip
MAGIC1, MAGIC2 = 0x46505853, 0x46505845
# offsetof(struct sigcontext, field) / 8, arch/x86/include/uapi/asm/sigcontext.h
SIGCONTEXT = [
    "r8",
    "r9",
    "r10",
    "r11",
    "r12",
    "r13",
    "r14",
    "r15",
    "rdi",
    "rsi",
    "rbp",
    "rbx",
    "rdx",
    "rax",
    "rcx",
    "rsp",
    "rip",
    "eflags",
]
UCONTEXT_OFF = 8
SIGCONTEXT_OFF = UCONTEXT_OFF + 40
FPSTATE_OFF = SIGCONTEXT_OFF + 184
MASK_OFF = UCONTEXT_OFF + 296


def _frame(layout: XsaveLayout, xstate: bytes, regs: Registers = REGS) -> SignalFrame:
    return encode_signal_frame(
        regs=regs, xstate=xstate, mask=0xABCD, trampoline_addr=0x1234, layout=layout
    )


def _image(frame: SignalFrame) -> bytes:
    (addr,) = struct.unpack_from("<Q", frame.data, FPSTATE_OFF)
    return frame.data[addr - frame.addr :]


def _xstate(layout: XsaveLayout, present: int) -> bytes:
    data = bytearray(range(256)) * (layout.max_size // 256 + 1)
    del data[layout.max_size :]
    struct.pack_into("<Q", data, 512, present)
    return bytes(data)


def test_layouts() -> None:
    assert (AVX.default_size, AVX.max_size, AVX.dynamic_features) == (832, 832, 0)
    assert (AMX.default_size, AMX.max_size, AMX.dynamic_features) == (2816, 11008, 1 << 18)
    assert AMX.default_features == 0x202E7
    assert plan_xsave_layout(3, {}).default_size == 576


def test_registers_and_mask() -> None:
    frame = _frame(AVX, _xstate(AVX, 7))
    values = struct.unpack_from("<18Q", frame.data, SIGCONTEXT_OFF)
    assert values == tuple(getattr(REGS, name) for name in SIGCONTEXT)
    assert struct.unpack_from("<4H", frame.data, SIGCONTEXT_OFF + 144) == (0x33, 0, 0, 0x2B)
    assert struct.unpack_from("<Q", frame.data, MASK_OFF) == (0xABCD,)
    assert struct.unpack_from("<Q", frame.data) == (0x1234,)


def test_alternate_stack_is_left_alone() -> None:
    frame = _frame(AVX, _xstate(AVX, 7))
    _, flags, _ = struct.unpack_from("<QIxxxxQ", frame.data, UCONTEXT_OFF + 16)
    # Neither 0, SS_ONSTACK nor SS_DISABLE: sigaltstack refuses it, rt_sigreturn goes on.
    assert flags not in (0, 1, 2)


@pytest.mark.parametrize("sp_low", range(0, 128, 8))
def test_place(sp_low: int) -> None:
    regs = REGS._replace(rsp=0x7FFF_0000_1000 + sp_low)
    frame = _frame(AVX, _xstate(AVX, 7), regs)
    assert frame.addr + len(frame.data) <= regs.rsp - 128
    assert frame.addr % 16 == 0
    (fpstate_addr,) = struct.unpack_from("<Q", frame.data, FPSTATE_OFF)
    assert fpstate_addr % 64 == 0


@pytest.mark.parametrize(
    ("layout", "present", "size"),
    [(AVX, 7, 832), (AMX, 0x2E7, 2816), (AMX, 0x602E7, 11008)],
)
def test_xsave_image(layout: XsaveLayout, present: int, size: int) -> None:
    xstate = _xstate(layout, present)
    image = _image(_frame(layout, xstate))
    assert image[:464] == xstate[:464]
    assert image[512:size] == xstate[512:size]
    magic1, extended_size, features, xstate_size = struct.unpack_from("<IIQI", image, 464)
    assert (magic1, extended_size, xstate_size) == (MAGIC1, size + 4, size)
    assert features & present == present
    assert struct.unpack_from("<I", image, size) == (MAGIC2,)
    # Room for dynamic features that are not in use: the mark is looked for there.
    assert struct.unpack_from("<I", image, layout.max_size) == (MAGIC2,)


def test_short_image() -> None:
    with pytest.raises(UnsupportedTarget):
        _frame(AMX, _xstate(AVX, 7))


def test_a_scan_finds_it() -> None:
    frame = _frame(AVX, _xstate(AVX, 7))
    words = struct.unpack(f"<{len(frame.data) // 8}Q", frame.data[: len(frame.data) & -8])
    at = [i for i, word in enumerate(words) if word & FRAME_SEGMENTS_MASK == FRAME_SEGMENTS]
    assert [words[i - FRAME_SP_WORDS] for i in at] == [REGS.rsp]
    assert [words[i - FRAME_PC_WORDS] for i in at] == [REGS.rip]


@pytest.mark.parametrize("rsp", [0, 8, RED_ZONE_SIZE, 1024])
def test_no_room_below_the_stack_pointer(rsp: int) -> None:
    """A thread may have lost its stack; kernel workers never had one."""
    with pytest.raises(UnsupportedTarget, match="stack pointer"):
        _frame(AVX, _xstate(AVX, 7), REGS._replace(rsp=rsp))


def test_highest_stack_pointer() -> None:
    assert _frame(AVX, _xstate(AVX, 7), REGS._replace(rsp=(1 << 64) - 1)).addr > 0
