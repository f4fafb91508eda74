# SPDX-License-Identifier: Apache-2.0
"""Of which sites verdicts on targets are the same, without a process."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import cast

import pytest

from optpoline.controller.target import LoadedModule, Target
from optpoline.discover import ModuleImage, SiteScan
from optpoline.model import Addr, Module, OperandLoad, Site, SiteKind, Table
from optpoline.patch.arena import Arena
from tests.unit.controller.lone_arena import ARENA_ADDR, make_arena, make_record, make_site

SIZE = 0x10_0000
LOAD = OperandLoad(code=bytes.fromhex("4c 8b 9b 10 00 00 00"))
"""mov 0x10(%rbx), %r11"""


@pytest.fixture
def arenas() -> Iterator[tuple[Arena, Arena]]:
    """Return two arenas."""
    made = make_arena(), make_arena(Addr(ARENA_ADDR + (1 << 28)))
    yield made
    for arena in made:
        arena.close()


def module_at(start: int) -> LoadedModule:
    """Return a module of which nothing is known but where it is."""
    module = Module(
        path="/bin/program",
        load_bias=start,
        start=Addr(start),
        end=Addr(start + SIZE),
        mappings=(),
        is_main=True,
        build_id=None,
    )
    return LoadedModule(
        module=module, image=cast(ModuleImage, object()), scan=cast(SiteScan, object())
    )


def test_sites_are_alike_in_all_that_verdicts_depend_on(arenas: tuple[Arena, Arena]) -> None:
    """The same file may be mapped twice; the operand matters where nothing is loaded into it."""
    site = make_site()
    start = site.addr - site.addr % SIZE
    target = Target.__new__(Target)
    target.modules = {(at, "", 0): module_at(at) for at in (start, start + SIZE)}

    def is_kin(one: Site, other: Site, *, in_arenas: tuple[int, int] = (0, 0)) -> bool:
        """Tell whether two sites are."""
        first, second = (
            target.guard_kin(make_record(arenas[number], each))
            for number, each in zip(in_arenas, (one, other), strict=True)
        )
        assert (first == second) == (hash(first) == hash(second))
        return first == second

    thunk = replace(site.thunk, operand="rcx")
    far = Addr(site.addr + SIZE)
    assert is_kin(site, replace(make_site(1), table=Table(name="handlers", type="int")))
    assert not is_kin(site, site, in_arenas=(0, 1))
    assert not is_kin(site, replace(site, kind=SiteKind.JUMP))
    assert not is_kin(site, replace(site, thunk=thunk))
    assert not is_kin(site, replace(site, addr=far))
    loaded = replace(site, load=LOAD)
    assert not is_kin(site, loaded)
    assert is_kin(loaded, replace(loaded, thunk=thunk))
    assert is_kin(loaded, replace(loaded, addr=far))
    assert not is_kin(loaded, replace(loaded, kind=SiteKind.JUMP))
