# SPDX-License-Identifier: Apache-2.0
"""The sites of each table of dynamic calls, and what they are known to call together.

Only tables that two sites or more have are kept: a site alone has nobody to share with, and
is decided on like any other. Nothing here is done at a poll; work is done where a window of a
site of a table ends, for that site, and where a first window ends, for the tables in it.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable

from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import BranchSource, SiteState
from optpoline.learn.counting import NO_COUNTS, SiteCounts
from optpoline.learn.pooling import SharedCounts, TablePool
from optpoline.model import Addr, Table

__all__ = ["Tables"]


class Tables:
    """The tables of one session."""

    def __init__(self) -> None:
        """Know no site."""
        self._members: dict[Table, dict[Addr, SiteRecord]] = {}
        self._pools: dict[Table, TablePool] = {}

    def use(self, records: Iterable[SiteRecord]) -> None:
        """Take in which sites there are: what those that are gone had counted is dropped."""
        found: dict[Table, dict[Addr, SiteRecord]] = defaultdict(dict)
        for record in records:
            if record.site.table is not None:
                found[record.site.table][record.site.addr] = record
        members = {table: sites for table, sites in found.items() if len(sites) > 1}
        for table, pool in self._pools.items():
            for addr in self._members[table].keys() - members.get(table, {}).keys():
                pool.forget(addr)
        self._pools = {table: self._pools.get(table) or TablePool() for table in members}
        self._members = members

    def note(self, record: SiteRecord, counts: SiteCounts) -> None:
        """Take in what a window of a site has counted, at the rate that the site has by now."""
        pool = self._pool_of(record)
        if pool is not None and record.rate_hz is not None:
            pool.note(record.site.addr, counts, record.rate_hz)

    def _pool_of(self, record: SiteRecord) -> TablePool | None:
        """Return the pool of a site's table, if it shares one."""
        return None if record.site.table is None else self._pools.get(record.site.table)

    def share(self, record: SiteRecord) -> SharedCounts | None:
        """Return by what a site on its thunk is decided on, or None if by itself alone."""
        pool = self._pool_of(record)
        if pool is None:
            return None
        shared = pool.share(record.news or NO_COUNTS)
        if shared.is_by_table and record.source is BranchSource.SITE:
            return None  # it was judged by what it does itself before, and keeps to that
        return shared

    def find_idle(self, learned: Collection[SiteRecord]) -> list[SiteRecord]:
        """Return sites that were not learned, and whose table may know what they call.

        What a table knew before is nothing new: others of it must have counted.

        Args:
            learned: The sites of a first window, which is over.
        """
        tables = {record.site.table for record in learned if record.is_news}
        tables &= self._members.keys()
        taken = {record.site.addr for record in learned} if tables else set[Addr]()
        return [
            record
            for table in tables
            if table is not None
            for addr, record in self._members[table].items()
            if record.state is SiteState.BASELINE
            and record.home is None
            and record.source is not BranchSource.SITE
            and addr not in taken
        ]
