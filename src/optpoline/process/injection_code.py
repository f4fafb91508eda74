# SPDX-License-Identifier: Apache-2.0
"""The target's own code that injected system calls run on: a ``syscall``, and a way back."""

from __future__ import annotations

from dataclasses import dataclass

from optpoline.errors import TargetFault, UnsupportedTarget
from optpoline.model import Mapping
from optpoline.process.host_cpu import read_xsave_layout
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps
from optpoline.x86.vdso import SIGRETURN_CODES, ReturnPath, find_return_path
from optpoline.x86.xsave import XsaveLayout

__all__ = ["InjectionCode", "find_injection_code"]

_SEARCH_CHUNK_SIZE = 1 << 20
_MAX_SEARCH_SIZE = 1 << 28  # libc is searched first; this bounds a target without one


@dataclass(frozen=True, slots=True, kw_only=True)
class InjectionCode:
    """The two pieces of a target's own code that injection uses.

    Attributes:
        path: A ``syscall`` instruction and its way to a ``ret``.
        trampoline_addr: Address of code that calls rt_sigreturn.
        trampoline_code: That code.
        xsave_layout: Sizes of XSAVE images on this machine.
    """

    path: ReturnPath
    trampoline_addr: int
    trampoline_code: bytes
    xsave_layout: XsaveLayout

    def is_present(self, memory: RemoteMemory) -> bool:
        """Say whether a target still has both."""
        path, size = self.path, len(self.trampoline_code)
        try:
            return (
                memory.read(path.syscall_addr, len(path.code)) == path.code
                and memory.read(self.trampoline_addr, size) == self.trampoline_code
            )
        except TargetFault:
            return False


def find_injection_code(pid: int, memory: RemoteMemory) -> InjectionCode:
    """Find what injection needs in a target; takes milliseconds, so do it once.

    Target state: running.

    Raises:
        UnsupportedTarget: if it has no vDSO, or no rt_sigreturn trampoline.
    """
    mappings = read_maps(pid)
    path = None
    for mapping in mappings:
        if mapping.path == "[vdso]":
            path = find_return_path(memory.read(mapping.start, mapping.size), mapping.start)
    if path is None:
        raise UnsupportedTarget(
            f"process {pid} has no vDSO with a usable syscall instruction",
            hint="boot without vdso=0, or run the program where nothing unmaps it",
        )
    text = [m for m in mappings if m.is_executable and m.path.startswith("/")]
    text.sort(key=lambda m: "libc" not in m.path.rpartition("/")[2])
    for mapping in _bounded(text):
        for code in SIGRETURN_CODES:
            addr = _search(memory, mapping, code)
            if addr is not None:
                return InjectionCode(
                    path=path,
                    trampoline_addr=addr,
                    trampoline_code=code,
                    xsave_layout=read_xsave_layout(),
                )
    raise UnsupportedTarget(
        f"process {pid} has no rt_sigreturn trampoline in its text",
        hint="a static program that installs no signal handler has none: link it dynamically",
    )


def _bounded(mappings: list[Mapping]) -> list[Mapping]:
    """Return as many mappings as are worth searching."""
    total, bounded = 0, []
    for mapping in mappings:
        total += mapping.size
        if total > _MAX_SEARCH_SIZE:
            break
        bounded.append(mapping)
    return bounded


def _search(memory: RemoteMemory, mapping: Mapping, code: bytes) -> int | None:
    """Return where a mapping has these bytes first, or None."""
    for start in range(mapping.start, mapping.end, _SEARCH_CHUNK_SIZE):
        size = min(_SEARCH_CHUNK_SIZE + len(code) - 1, mapping.end - start)
        try:
            off = memory.read(start, size).find(code)
        except TargetFault:
            return None  # beyond the end of a truncated file
        if off >= 0:
            return start + off
    return None
