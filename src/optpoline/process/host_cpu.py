# SPDX-License-Identifier: Apache-2.0
"""Ask the CPU this process runs on for what the kernel does not tell.

The few bytes of code are mapped read-only and executable from a memory file,
run once and unmapped.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable
from functools import cache

from optpoline.errors import UnsupportedTarget
from optpoline.x86.xsave import CPUID_CODE, XGETBV_CODE, XsaveLayout, plan_xsave_layout

__all__ = ["EXECUTABLE_FORBIDDEN", "read_xsave_layout"]

EXECUTABLE_FORBIDDEN = "a security module or seccomp may forbid executable memory to optpoline"
"""Why code of ours cannot be mapped into this process."""

_XSAVE_LEAF = 13
_OSXSAVE_BIT = 27  # of ecx of leaf 1
_N_FEATURES = 63
_MFD_NOEXEC_SEAL = 8
_MAP_FAILED = ctypes.c_void_p(-1).value


@cache
def read_xsave_layout() -> XsaveLayout:
    """Return where XSAVE features lie in a thread's image on this machine.

    Raises:
        UnsupportedTarget: if the CPU or kernel has no XSAVE.
    """
    return _run_code(CPUID_CODE.ljust(64, b"\xcc") + XGETBV_CODE, _ask_cpu)


def _ask_cpu(code_addr: int) -> XsaveLayout:
    """Run the mapped code."""
    out = (ctypes.c_uint32 * 4)()
    call = ctypes.CFUNCTYPE(None, ctypes.c_uint32, ctypes.c_uint32, ctypes.c_void_p)(code_addr)

    def cpuid(leaf: int, subleaf: int) -> tuple[int, ...]:
        call(leaf, subleaf, ctypes.addressof(out))
        return tuple(out)

    if not cpuid(1, 0)[2] >> _OSXSAVE_BIT & 1:
        raise UnsupportedTarget("this CPU or kernel has no XSAVE")
    xcr0 = int(ctypes.CFUNCTYPE(ctypes.c_uint64)(code_addr + 64)())
    extents = {}
    for feature in range(2, _N_FEATURES):
        if xcr0 >> feature & 1:
            size, off, _, _ = cpuid(_XSAVE_LEAF, feature)
            extents[feature] = (off, size)
    return plan_xsave_layout(xcr0, extents)


def _run_code(code: bytes, run: Callable[[int], XsaveLayout]) -> XsaveLayout:
    """Map code executable, hand its address on, and unmap it."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    try:
        fd = os.memfd_create("optpoline-cpuid", os.MFD_CLOEXEC | _MFD_NOEXEC_SEAL)
    except OSError:
        fd = os.memfd_create("optpoline-cpuid", os.MFD_CLOEXEC)  # before Linux 6.3
    try:
        os.write(fd, code)
        addr = libc.mmap(
            None, ctypes.c_size_t(mmap.PAGESIZE), mmap.PROT_READ | mmap.PROT_EXEC,
            mmap.MAP_PRIVATE, fd, ctypes.c_long(0),
        )  # fmt: skip
    finally:
        os.close(fd)
    if addr == _MAP_FAILED:
        raise UnsupportedTarget(
            "optpoline may not map its own code that asks the CPU its sizes",
            hint=EXECUTABLE_FORBIDDEN,
        )
    try:
        return run(addr)
    finally:
        libc.munmap(ctypes.c_void_p(addr), ctypes.c_size_t(mmap.PAGESIZE))
