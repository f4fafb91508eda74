# SPDX-License-Identifier: Apache-2.0
"""Sizes of XSAVE images, as the CPU states them.

The code below asks the CPU we run on; running it is the caller's business. The
target runs on the same machine, so its images have the same layout.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["CPUID_CODE", "XGETBV_CODE", "XsaveLayout", "plan_xsave_layout"]

CPUID_CODE = bytes.fromhex(
    # push rbx ; mov eax, edi ; mov ecx, esi ; mov r8, rdx ; cpuid
    "53 89f8 89f1 4989d0 0fa2"
    # mov [r8], eax ; mov [r8+4], ebx ; mov [r8+8], ecx ; mov [r8+12], edx ; pop rbx ; ret
    "418900 41895804 41894808 4189500c 5b c3"
)
"""C function: void cpuid(u32 leaf, u32 subleaf, u32 out[4])."""

XGETBV_CODE = bytes.fromhex(
    # xor ecx, ecx ; xgetbv ; shl rdx, 32 ; or rax, rdx ; ret
    "31c9 0f01d0 48c1e220 4809d0 c3"
)
"""C function: u64 xgetbv(void), the value of XCR0."""

_LEGACY_SIZE = 512 + 64  # the FXSAVE area and the header; x87 and SSE are in it
_N_LEGACY_FEATURES = 2
_DYNAMIC_FEATURES = 1 << 18
# XFEATURE_MASK_USER_DYNAMIC (arch/x86/include/asm/fpu/xstate.h): AMX tile data, which
# a process has to ask for; all others are in every thread's image.


@dataclass(frozen=True, slots=True, kw_only=True)
class XsaveLayout:
    """Where XSAVE features end on this CPU, in the standard (uncompacted) format.

    Attributes:
        default_features: Features every thread has (XCR0 without the dynamic ones).
        default_size: Size of a default thread's image in bytes.
        dynamic_features: Features a thread must ask for (AMX tile data).
        max_size: Size of an image with all features.
    """

    default_features: int
    default_size: int
    dynamic_features: int
    max_size: int


def plan_xsave_layout(xcr0: int, extents: Mapping[int, tuple[int, int]]) -> XsaveLayout:
    """Work out image sizes from what the CPU says.

    Args:
        xcr0: Enabled features.
        extents: (offset, size) of each enabled feature from number 2 on, as
            CPUID leaf 13 gives them.

    >>> plan_xsave_layout(7, {2: (576, 256)}).default_size
    832
    """
    default_features = xcr0 & ~_DYNAMIC_FEATURES
    sizes = {_N_LEGACY_FEATURES - 1: _LEGACY_SIZE}
    sizes |= {feature: off + size for feature, (off, size) in extents.items()}
    default = [size for feature, size in sizes.items() if default_features >> feature & 1]
    return XsaveLayout(
        default_features=default_features,
        default_size=max(default, default=_LEGACY_SIZE),
        dynamic_features=xcr0 & _DYNAMIC_FEATURES,
        max_size=max(size for feature, size in sizes.items() if xcr0 >> feature & 1),
    )
