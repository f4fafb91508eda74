# SPDX-License-Identifier: Apache-2.0
"""Memory, tried on our own process."""

from __future__ import annotations

import ctypes
import mmap
import os
import resource

import pytest

from optpoline.errors import PermissionDenied, ProcessGone, TargetFault
from optpoline.process.births import BirthWatch
from optpoline.process.host_cpu import read_xsave_layout
from optpoline.process.memory import RemoteMemory, store_data
from optpoline.process.procfs import read_maps

PAGE = mmap.PAGESIZE
_libc = ctypes.CDLL(None)


@pytest.fixture
def pages() -> int:
    """Return the address of a writable, a read-only and an unreadable page."""
    _libc.mmap.restype = ctypes.c_void_p
    addr = _libc.mmap(None, 3 * PAGE, 3, 0x22, -1, ctypes.c_long(0))
    _libc.mprotect(ctypes.c_void_p(addr + PAGE), PAGE, 1)
    _libc.munmap(ctypes.c_void_p(addr + 2 * PAGE), PAGE)
    return int(addr)


def test_read_and_write(pages: int) -> None:
    with RemoteMemory(os.getpid()) as memory:
        memory.write(pages + 100, b"hello")
        assert memory.read(pages + 99, 7) == b"\0hello\0"
        # Protection is no obstacle: this is how text is written.
        memory.write(pages + PAGE - 2, b"over")
        assert memory.read(pages + PAGE - 2, 4) == b"over"
        assert memory.is_current()
        assert memory.read(pages, 0) == b""


def test_no_descriptor_left_is_an_error_that_a_session_outlives() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
    try:
        with pytest.raises(PermissionDenied, match="Too many open files"):
            RemoteMemory(os.getpid())
        with pytest.raises(PermissionDenied, match="Too many open files"):
            read_maps(os.getpid())
        with pytest.raises(PermissionDenied, match="Too many open files"):
            BirthWatch().list_new()
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)


@pytest.mark.parametrize("addr", [0, 1 << 63, (1 << 64) - 8, -8])
def test_no_such_address(addr: int) -> None:
    with RemoteMemory(os.getpid()) as memory:
        with pytest.raises(TargetFault):
            memory.read(addr, 8)
        with pytest.raises(TargetFault):
            memory.write(addr, bytes(8))


def test_beyond_the_end(pages: int) -> None:
    with RemoteMemory(os.getpid()) as memory:
        with pytest.raises(TargetFault):
            memory.read(pages + 2 * PAGE - 4, 8)
        with pytest.raises(TargetFault):
            memory.write(pages + 2 * PAGE - 4, bytes(8))


def test_store_respects_protection(pages: int) -> None:
    store_data(os.getpid(), pages, b"hello")
    with RemoteMemory(os.getpid()) as memory:
        assert memory.read(pages, 5) == b"hello"
    with pytest.raises(TargetFault):
        store_data(os.getpid(), pages + PAGE - 2, b"over")


def test_no_such_process() -> None:
    with pytest.raises(ProcessGone):
        RemoteMemory(2**22 + 1)


def test_close_twice() -> None:
    memory = RemoteMemory(os.getpid())
    memory.close()
    memory.close()


def test_xsave_layout_of_this_machine() -> None:
    layout = read_xsave_layout()
    assert layout.default_features & 3 == 3
    assert 576 <= layout.default_size <= layout.max_size
    assert (layout.max_size > layout.default_size) == bool(layout.dynamic_features)
