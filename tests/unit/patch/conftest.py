# SPDX-License-Identifier: Apache-2.0
"""An arena as a controller has it, with no program on the other side."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

from optpoline.model import Addr
from optpoline.patch.arena import Arena, ArenaGeometry
from optpoline.patch.layout import HEADER_SIZE, ArenaHeader

ARENA_ADDR = Addr(0x2000_0000)
GEOMETRY = ArenaGeometry(
    code_off=HEADER_SIZE + 4096,
    literal_off=HEADER_SIZE + 4096 + 8192,
    counter_off=HEADER_SIZE + 4096 + 8192 + 4096,
    size=HEADER_SIZE + 4096 + 8192 + 4096 + 4096,
)


@pytest.fixture
def arena_fd() -> Iterator[int]:
    """Return a memfd of an arena's size."""
    fd = os.memfd_create("optpoline", os.MFD_CLOEXEC)
    os.ftruncate(fd, GEOMETRY.size)
    yield fd
    os.close(fd)


@pytest.fixture
def arena(arena_fd: int) -> Iterator[Arena]:
    """Return a small, empty arena."""
    header = ArenaHeader(
        size=GEOMETRY.size,
        code_off=GEOMETRY.code_off,
        literal_off=GEOMETRY.literal_off,
        counter_off=GEOMETRY.counter_off,
        controller_pid=1,
        controller_start=2,
        target_pid=3,
        n_entries=0,
    )
    made = Arena(ARENA_ADDR, arena_fd, GEOMETRY, header)
    yield made
    made.close()
