# SPDX-License-Identifier: Apache-2.0
"""Find a module's own restartable sequences, in which no site may be touched.

While a thread is inside a section that it has announced (struct rseq_cs), the
kernel restarts it at the section's abort handler when it is preempted. A block
lies outside: preempted there, the thread would go on as if nothing had happened.

The four bytes before an abort handler are the signature that the kernel demands.
Whoever points at code behind a signature, from where a descriptor has its abort
address, is a descriptor. They lie in the section ``__rseq_cs``, which stripped
files may have lost the name of; so all data of the module is searched.

Non-goal: descriptors that a program writes to its heap or stack as it runs.
"""

from __future__ import annotations

import struct

import numpy as np

from optpoline.discover.functions import Span
from optpoline.discover.image import ModuleImage
from optpoline.errors import TargetFault
from optpoline.model import Addr

__all__ = ["find_critical_sections"]

_SIGNATURE = struct.pack("<I", 0x53053053)
"""RSEQ_SIG on x86, of glibc (sysdeps/unix/sysv/linux/x86/bits/rseq.h) and librseq alike."""

_DESCRIPTOR = struct.Struct("<IIQQQ")
"""struct rseq_cs: version, flags, start, length, abort address (include/uapi/linux/rseq.h)."""

_ABORT_OFF = 24
_MAX_SIZE = 1 << 16
"""Sections are a few instructions; longer ones are no descriptors."""


def find_critical_sections(image: ModuleImage) -> tuple[Span, ...]:
    """Return the address ranges of a module's restartable sequences.

    Args:
        image: The module.

    Returns:
        Start to the end of each, in address order; none where text or data cannot be read.
    """
    aborts = _find_signed(image)
    if not aborts:
        return ()
    wanted = np.array(aborts, dtype=np.uint64)
    found: set[Span] = set()
    for addr, size in image.data_ranges():
        first = -addr % 8
        try:
            data = image.read(Addr(addr + first), (size - first) & ~7)
        except TargetFault:
            continue
        words = np.frombuffer(data, dtype="<u8")
        for index in np.flatnonzero(np.isin(words, wanted)).tolist():
            off = index * 8 - _ABORT_OFF
            if off >= 0 and (span := _read_descriptor(image, data, off)) is not None:
                found.add(span)
    return tuple(sorted(found, key=lambda span: span.start))


def _find_signed(image: ModuleImage) -> list[int]:
    """Return the addresses that a signature stands before."""
    signed: list[int] = []
    for text in image.texts:
        off = text.code.find(_SIGNATURE)
        while off >= 0:
            signed.append(text.addr + off + len(_SIGNATURE))
            off = text.code.find(_SIGNATURE, off + 1)
    return signed


def _read_descriptor(image: ModuleImage, data: bytes, off: int) -> Span | None:
    """Return the range of a descriptor, or None if it is none."""
    version, _, start, size, _ = _DESCRIPTOR.unpack_from(data, off)
    if version != 0 or not 0 < size <= _MAX_SIZE or not image.is_code(start):
        return None
    return Span(Addr(start), Addr(start + size))
