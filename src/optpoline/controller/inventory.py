# SPDX-License-Identifier: Apache-2.0
"""The sites of a session: taken in with their modules, dropped with them.

Modules come and go while a program runs. What could be executed when they were last looked
for is remembered, so that a look which finds nothing new costs one comparison.
"""

from __future__ import annotations

from collections.abc import Callable

from optpoline.controller.collector import collector_paused
from optpoline.controller.events import EventKind
from optpoline.controller.hot_sites import HotSites
from optpoline.controller.records import SiteRecord
from optpoline.controller.standing import Standing
from optpoline.controller.summary import SessionState
from optpoline.controller.tables import Tables
from optpoline.controller.target import Target
from optpoline.errors import ArenaError
from optpoline.model import Addr, Mapping, Module

__all__ = ["Inventory"]


class Inventory:
    """The records of a session's sites.

    Args:
        target: The target.
        standing: Is told what came and went.
        hot: Is shown the sites whenever others are there.
        tables: Likewise.
        forget: Called with the range of a module that was unmapped, if it had sites.
    """

    def __init__(
        self,
        target: Target,
        standing: Standing,
        hot: HotSites,
        tables: Tables,
        forget: Callable[[Addr, Addr], None],
    ) -> None:
        """Begin with no site."""
        self._target = target
        self._standing = standing
        self._hot = hot
        self._tables = tables
        self._forget = forget
        self._code_seen: tuple[Mapping, ...] = ()
        """What could be executed when modules were last looked for."""
        self.records: list[SiteRecord] = []
        """Of all sites, refused ones included."""

    def is_code_new(self) -> bool:
        """Tell whether something else can be executed than when modules were looked for last.

        As of the last ``Target.read_maps``.
        """
        return self._target.code_maps != self._code_seen

    def take_in(self) -> list[SiteRecord]:
        """Take in modules that were loaded since the last look; return their records.

        Raises:
            ArenaError: if a session that has just attached has no arena for any site.
        """
        with collector_paused():
            return self._take_in()

    def _take_in(self) -> list[SiteRecord]:
        """Do so; thousands of objects are made that all stay."""
        self._target.read_maps()
        self._code_seen = self._target.code_maps
        added, gone = self._target.refresh_modules()
        for loaded in gone:
            self._drop(loaded.module)
        fresh: list[SiteRecord] = []
        refused: list[tuple[Module, ArenaError]] = []
        for loaded in added:
            try:
                fresh += self._target.make_records(loaded)
            except ArenaError as error:
                refused.append((loaded.module, error))
        self.records += fresh
        if fresh or gone:
            self._hot.use(self.records)
            self._tables.use(self.records)
        for why in self._target.unread.values():
            self._standing.note_once(why)
        if refused and not self.records and self._standing.state is SessionState.ATTACHED:
            raise refused[0][1]
        for module, reason in refused:
            self._standing.note(f"{module.path} left alone: {reason}")
        return fresh

    def _drop(self, module: Module) -> None:
        """Drop records of a module that was unmapped; its text is gone with it."""
        kept = [r for r in self.records if not module.start <= r.site.addr < module.end]
        if len(kept) != len(self.records):
            self.records = kept
            self._forget(module.start, module.end)
            self._standing.tell(EventKind.MODULE_GONE, f"{module.path} was unloaded")
