# SPDX-License-Identifier: Apache-2.0
"""Only what can be a stale ``rseq_cs`` is cleared, and only if it still is."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from types import SimpleNamespace
from typing import cast

import pytest

from optpoline.controller.stale_sections import clear_stale_sections, find_stale_sections
from optpoline.controller.target import Target
from optpoline.model import Addr
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps

# Nothing of this process is there: its memory holds these numbers only where a test wrote them.
DESCRIPTORS = [Addr(0x1234_5678_9A40), Addr(0x1234_5678_9AE0)]
N_CPUS = 4
PAGE_SIZE = 4096

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS = 1, 2, 0x20


@pytest.fixture
def target() -> Iterator[Target]:
    """Return this process as a target."""
    pid = os.getpid()
    with RemoteMemory(pid) as memory:
        yield cast(
            Target, SimpleNamespace(pid=pid, memory=memory, read_maps=lambda: read_maps(pid))
        )


@pytest.fixture(params=[MAP_PRIVATE])
def page(request: pytest.FixtureRequest) -> Iterator[int]:
    """Return the address of a page of zeros."""
    addr = _libc.mmap(None, PAGE_SIZE, 3, request.param | MAP_ANONYMOUS, -1, 0)
    ctypes.memset(addr, 0, PAGE_SIZE)
    yield addr
    _libc.munmap(addr, PAGE_SIZE)


def put(addr: int, cpu_id: int, section: int) -> None:
    """Write the begin of a ``struct rseq``."""
    data = struct.pack("<IiQ", 0, cpu_id, section)
    ctypes.memmove(addr, data, len(data))


def find(target: Target, page: int) -> list[int]:
    """Return what is found on one page, as offsets."""
    found = find_stale_sections(target, DESCRIPTORS, N_CPUS)
    return [addr - page for addr in found if page <= addr < page + PAGE_SIZE]


def test_areas_of_threads_that_were_inside(target: Target, page: int) -> None:
    put(page, 0, DESCRIPTORS[0])
    put(page + 64, N_CPUS - 1, DESCRIPTORS[1])
    put(page + 128, -1, DESCRIPTORS[0])  # not registered: it aborts before it counts
    put(page + PAGE_SIZE - 32, 2, DESCRIPTORS[1])
    assert find(target, page) == [8, 72, 136, PAGE_SIZE - 24]


def test_nothing_else_is_found(target: Target, page: int) -> None:
    put(page, 0, DESCRIPTORS[0] + 32)  # near one
    put(page + 32, 0, 0)
    put(page + 64 + 8, 0, DESCRIPTORS[0])  # aligned as no area is
    put(page + 96 + 16, 0, DESCRIPTORS[0])
    put(page + 160, N_CPUS, DESCRIPTORS[0])  # behind no CPU number
    assert find(target, page) == []
    assert find_stale_sections(target, [], N_CPUS) == ()


@pytest.mark.parametrize("page", [MAP_SHARED], indirect=True)
def test_memory_of_other_processes_is_left_alone(target: Target, page: int) -> None:
    put(page, 0, DESCRIPTORS[0])
    assert find(target, page) == []


def test_cleared_is_what_is_still_there(target: Target, page: int) -> None:
    before = bytes(range(256)) * (PAGE_SIZE // 256)
    ctypes.memmove(page, before, PAGE_SIZE)
    put(page, 1, DESCRIPTORS[0])
    put(page + 32, 1, DESCRIPTORS[1])
    places = [Addr(page + off) for off in find(target, page)]
    assert len(places) == 2
    put(page + 32, 1, 0x7777)  # a thread uses that memory again
    with_one_gone = [*places, Addr(8)]
    assert clear_stale_sections(target.memory, with_one_gone, DESCRIPTORS) == 1
    after = ctypes.string_at(page, PAGE_SIZE)
    assert after[:16] == struct.pack("<IiQ", 0, 1, 0)
    assert after[32:48] == struct.pack("<IiQ", 0, 1, 0x7777)
    assert after[48:] == before[48:]
    assert find(target, page) == []
