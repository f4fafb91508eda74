# SPDX-License-Identifier: Apache-2.0
"""Signal frames: what makes rt_sigreturn put a thread's whole state back.

A frame built here is never delivered by a signal; a thread that runs into an
``rt_sigreturn`` with its stack pointer 8 above the frame gets the registers,
the vector state and the signal mask in it. Layout, in address order
(``struct rt_sigframe``, arch/x86/include/asm/sigframe.h)::

    +0    return address: `mov $15, %rax; syscall`
    +8    uc_flags, uc_link, uc_stack (24 bytes)
    +48   struct sigcontext (256 bytes), last its pointer to the XSAVE image
    +304  uc_sigmask
    ...   XSAVE image, 64-byte aligned, magic2 right behind it

The alternate signal stack cannot be read from outside. ``rt_sigreturn`` hands
uc_stack to sigaltstack and ignores its errors (restore_altstack), so a mode
that does not exist leaves the thread's setting as it is.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

from optpoline.errors import UnsupportedTarget
from optpoline.x86.registers import Registers
from optpoline.x86.xsave import XsaveLayout

__all__ = [
    "FRAME_PC_WORDS",
    "FRAME_SEGMENTS",
    "FRAME_SEGMENTS_MASK",
    "FRAME_SP_WORDS",
    "RED_ZONE_SIZE",
    "SignalFrame",
    "encode_signal_frame",
]

RED_ZONE_SIZE = 128
"""Bytes below rsp that belong to the running function (System V ABI)."""

FRAME_SEGMENTS = 0x002B_0000_0000_0033
"""The word of a 64-bit frame that holds cs (lowest 16 bits), gs, fs and ss (highest)."""

FRAME_SEGMENTS_MASK = 0xFFFF_0000_0000_FFFF
"""Which of its bits to compare: gs and fs may be anything."""

FRAME_SP_WORDS = 3
"""How many words before the segments a frame holds the interrupted stack pointer."""

FRAME_PC_WORDS = 2
"""How many words before the segments a frame holds the interrupted program counter."""

_FP_XSTATE_MAGIC1 = 0x46505853
_FP_XSTATE_MAGIC2 = 0x46505845
_SW_RESERVED_OFF = 464
_XSTATE_BV_OFF = 512
_XSAVE_ALIGN = 64
_UC_FP_XSTATE, _UC_SIGCONTEXT_SS, _UC_STRICT_RESTORE_SS = 1, 2, 4
_INVALID_SS_FLAGS = 4  # neither 0, SS_ONSTACK (1) nor SS_DISABLE (2): do_sigaltstack says EINVAL
_HEADER = struct.Struct("<QQQQIIQ")
_SIGCONTEXT = struct.Struct("<18Q4H4Q9Q")
_MASK_OFF = _HEADER.size + _SIGCONTEXT.size
_UCONTEXT_SIZE = _MASK_OFF + 8


@dataclass(frozen=True, slots=True, kw_only=True)
class SignalFrame:
    """Bytes to be placed on a thread's stack.

    Attributes:
        addr: Where the frame, and thus its return address, begins.
        data: Its bytes.
    """

    addr: int
    data: bytes


def encode_signal_frame(
    *, regs: Registers, xstate: bytes, mask: int, trampoline_addr: int, layout: XsaveLayout
) -> SignalFrame:
    """Build a frame below the red zone that restores a thread's state.

    Args:
        regs: Registers the thread shall have; its rsp says where the stack is.
        xstate: XSAVE image as PTRACE_GETREGSET(NT_X86_XSTATE) gives it.
        mask: Blocked signals, signal n in bit n-1.
        trampoline_addr: Address of code that calls rt_sigreturn.
        layout: Sizes of XSAVE images.

    Raises:
        UnsupportedTarget: if the XSAVE image is not of this layout, or there is no address
            space below the stack pointer.
    """
    image = _encode_fpstate(xstate, layout)
    top = regs.rsp - RED_ZONE_SIZE
    fpstate_addr = (top - len(image)) & -_XSAVE_ALIGN
    addr = (fpstate_addr - _UCONTEXT_SIZE) & -16
    if addr < 0:
        raise UnsupportedTarget(f"the stack pointer of the thread, {regs.rsp:#x}, is of no stack")
    header = _HEADER.pack(
        trampoline_addr,
        _UC_FP_XSTATE | _UC_SIGCONTEXT_SS | _UC_STRICT_RESTORE_SS,
        0,
        0,
        _INVALID_SS_FLAGS,
        0,
        0,
    )
    r = regs
    # Behind rip and eflags: cs, gs, fs, ss; err, trapno, oldmask, cr2, fpstate, reserved.
    sigcontext = _SIGCONTEXT.pack(
        r.r8, r.r9, r.r10, r.r11, r.r12, r.r13, r.r14, r.r15, r.rdi, r.rsi, r.rbp, r.rbx,
        r.rdx, r.rax, r.rcx, r.rsp, r.rip, r.eflags, r.cs, 0, 0, r.ss,
        0, 0, 0, 0, fpstate_addr, *(0,) * 8,
    )  # fmt: skip
    data = header + sigcontext + struct.pack("<Q", mask)
    data += bytes(fpstate_addr - addr - len(data)) + image
    return SignalFrame(addr=addr, data=data)


def _encode_fpstate(xstate: bytes, layout: XsaveLayout) -> bytes:
    """Return the image with the marks by which the kernel knows it is complete."""
    if len(xstate) < layout.default_size:
        raise UnsupportedTarget(
            f"the XSAVE image of the target has {len(xstate)} bytes, "
            f"this CPU's has {layout.default_size}"
        )
    (present,) = struct.unpack_from("<Q", xstate, _XSTATE_BV_OFF)
    size, features = layout.default_size, layout.default_features
    uses_dynamic = bool(present & layout.dynamic_features)
    if uses_dynamic:
        size, features = layout.max_size, features | layout.dynamic_features
    image = bytearray(xstate[: layout.max_size].ljust(layout.max_size, b"\0") + bytes(4))
    struct.pack_into("<IIQI", image, _SW_RESERVED_OFF, _FP_XSTATE_MAGIC1, size + 4, features, size)
    image[_SW_RESERVED_OFF + 20 : _XSTATE_BV_OFF] = bytes(28)
    # The kernel looks for magic2 behind the state the *thread* has room for
    # (fpstate->user_size), which cannot be read from outside. A thread with room
    # for dynamic features but none in use has nothing at default_size that is
    # loaded, so both places can carry the mark.
    struct.pack_into("<I", image, layout.max_size, _FP_XSTATE_MAGIC2)
    if not uses_dynamic:
        struct.pack_into("<I", image, layout.default_size, _FP_XSTATE_MAGIC2)
    return bytes(image)
