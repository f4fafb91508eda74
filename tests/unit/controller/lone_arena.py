# SPDX-License-Identifier: Apache-2.0
"""Arenas with no program on the other side, and sites whose blocks lie in them."""

from __future__ import annotations

import os

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.model import Addr, Site, SiteKind, Thunk, ThunkFlavour
from optpoline.patch.arena import Arena
from optpoline.patch.geometry import ArenaGeometry
from optpoline.patch.layout import JournalEntry
from tests.unit.patch.conftest import make_header

ARENA_ADDR = Addr(0x5000_0000)
THUNK = Thunk(addr=Addr(0x4F00_0000), operand="rax", flavour=ThunkFlavour.GCC, symbol=None)
N_CPUS = 2
CODE = bytes.fromhex("e8 fb ef ff ff")
"""``call thunk``, of the first site."""


def make_arena(addr: Addr = ARENA_ADDR, n_sites: int = 1) -> Arena:
    """Return an arena for that many sites; who asks for it closes it."""
    geometry = ArenaGeometry.for_sites(n_sites, N_CPUS)
    fd = os.memfd_create("optpoline", os.MFD_CLOEXEC)
    try:
        os.ftruncate(fd, geometry.size)
        return Arena(addr, fd, geometry, make_header(geometry))
    finally:
        os.close(fd)


def make_site(number: int = 0, kind: SiteKind = SiteKind.CALL) -> Site:
    """Return a site; each number has its own address."""
    addr = Addr(0x4F00_1000 + 16 * number)
    return Site(
        addr=addr,
        code=CODE,
        kind=kind,
        disp_addr=Addr(addr + 1),
        thunk=THUNK,
        module="/bin/program",
        function=None,
        function_addr=None,
    )


def make_record(arena: Arena, site: Site, state: SiteState = SiteState.BASELINE) -> SiteRecord:
    """Return the record of a site that leads to no block."""
    return SiteRecord(
        site=site,
        arena=arena,
        state=state,
        entry=JournalEntry(addr=site.addr, code=site.code, disp_off=1),
        inode=0,
        branch=site.code[1:5],
    )
