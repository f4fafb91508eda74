# SPDX-License-Identifier: Apache-2.0
"""The program does something in the instant between a look and what was decided on it.

The instant is found by doing it from within: the function that would act next is wrapped.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ParamSpec, TypeVar

import pytest

import optpoline
from optpoline.controller.poking import poke_in_stops, poke_patiently
from optpoline.controller.summary import DetachOutcome
from optpoline.model import Addr, Mapping
from optpoline.patch.placement import choose_arena_addr
from optpoline.process.procfs import read_maps
from tests.live.conftest import BuildTarget, LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness, arena_mappings

pytestmark = pytest.mark.live

PLUGIN = ("-shared", "-fPIC", *RETPOLINE)

P = ParamSpec("P")
R = TypeVar("R")


def _first(before: Callable[[], None], function: Callable[P, R]) -> Callable[P, R]:
    """Return a function before whose first call something happens."""
    is_done = False

    def wrapped(*args: P.args, **kwargs: P.kwargs) -> R:
        nonlocal is_done
        if not is_done:
            is_done = True
            before()
        return function(*args, **kwargs)

    return wrapped


class Replaced:
    """A plugin, and another one that takes its place in memory."""

    def __init__(self, target: LiveTarget, build_target: BuildTarget) -> None:
        """Open the one."""
        self._target = target
        self._paths = (
            build_target("plugin", *PLUGIN),
            build_target("plugin", *PLUGIN, "-O1", "-fno-inline"),
        )
        target.ask(f"open {self._paths[0]}")
        self._start = self._start_of(self._paths[0])

    def _start_of(self, path: Path) -> Addr:
        """Return where a module starts."""
        return min(m.start for m in read_maps(self._target.pid) if m.path == str(path))

    def replace(self) -> None:
        """Close the one, open the other."""
        assert self._target.ask("close") == "closed"
        self._target.ask(f"open {self._paths[1]}")
        assert self._start_of(self._paths[1]) == self._start


def test_a_module_is_replaced_before_its_sites_are_restored(
    start_target: StartTarget, build_target: BuildTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start_target("life", "spin", "1", flags=(*RETPOLINE, "-ldl"))
    before = Witness.of(target.pid)
    plugin = Replaced(target, build_target)
    with optpoline.attach(target.pid) as session:
        session.learn(0.1)
        at_last = _first(plugin.replace, poke_in_stops)
        monkeypatch.setattr("optpoline.controller.linker.poke_in_stops", at_last)
        result = session.detach()
    assert (result.outcome, result.foreign, result.notes) == (DetachOutcome.CLEAN, (), ())
    target.ask("close")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_module_is_replaced_before_a_takeover_restores_it(
    start_target: StartTarget, build_target: BuildTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = start_target("life", "spin", "1", flags=(*RETPOLINE, "-ldl"))
    before = Witness.of(target.pid)
    plugin = Replaced(target, build_target)
    session = optpoline.attach(target.pid)
    session.learn(0.1)
    session.close()
    at_last = _first(plugin.replace, poke_patiently)
    monkeypatch.setattr("optpoline.controller.takeover.poke_patiently", at_last)
    result = optpoline.restore(target.pid)
    assert (result.outcome, result.foreign, result.notes) == (DetachOutcome.CLEAN, (), ())
    target.ask("close")
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_the_place_for_an_arena_is_taken(
    start_target: StartTarget, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the stack of a thread that was started meanwhile, for instance."""
    target = start_target("promote", flags=RETPOLINE)
    before = Witness.of(target.pid)
    chosen: list[Addr | None] = []

    def choose_late(
        maps: Sequence[Mapping], start: int, end: int, size: int, near_size: int | None = None
    ) -> Addr | None:
        addr = choose_arena_addr(maps, start, end, size, near_size)
        # As if the program had mapped its text there after we looked.
        chosen.append(addr if chosen else Addr(start))
        return chosen[-1]

    monkeypatch.setattr("optpoline.controller.target.choose_arena_addr", choose_late)
    with optpoline.attach(target.pid) as session:
        assert len(chosen) == 2
        assert chosen[1] in {mapping.start for mapping in arena_mappings(target.pid)}
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
