# SPDX-License-Identifier: Apache-2.0
"""One live process: its modules and their sites, its arenas, and how long it was stopped."""

from __future__ import annotations

import bisect
import os
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from optpoline.controller.arenas import map_arena
from optpoline.controller.pace import Pace
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import SiteState
from optpoline.discover import ModuleImage, SiteScan, find_sites, flags_dead_at, operand_dead_at
from optpoline.errors import (
    AddressTaken,
    ArenaError,
    OptpolineError,
    PermissionDenied,
    ProcessGone,
)
from optpoline.model import Addr, Mapping, Module, Refusal, Site, SiteKind
from optpoline.patch.arena import Arena
from optpoline.patch.geometry import ArenaGeometry
from optpoline.patch.layout import ARENA_NAME, JournalEntry
from optpoline.patch.placement import choose_arena_addr, is_within_reach
from optpoline.patch.text import is_same_but_disp, leads_into, read_entries
from optpoline.process.cpus import read_n_possible_cpus
from optpoline.process.injection_code import InjectionCode, find_injection_code
from optpoline.process.memory import RemoteMemory
from optpoline.process.modules import is_anonymous, list_modules, open_module
from optpoline.process.permissions import explain_untraceable
from optpoline.process.procfs import (
    RUNS_NO_CODE,
    list_tids,
    read_maps,
    read_start_time,
    read_state_char,
)
from optpoline.process.sharers import SharerFinder
from optpoline.process.stop import Stop, Wake, stop_threads
from optpoline.process.thread_state import ThreadState, ThreadWhere, read_thread_state
from optpoline.process.waking import rank_call
from optpoline.x86.syscalls import Disturbance

__all__ = ["LoadedModule", "StopLog", "Target"]

MAX_PLACES = 8
"""How often a place for an arena is looked for: the program may map something there before we
do, such as the stacks of threads that it starts all the time."""


@dataclass(slots=True)
class StopLog:
    """How often and how long the target's threads were stopped.

    Attributes:
        limit_ns: How long a stop was to take at most.
    """

    limit_ns: int
    n_stops: int = 0
    n_over: int = 0
    max_ns: int = 0
    total_ns: int = 0

    def add(self, duration_ns: int) -> None:
        """Note one stop; 0 means that no thread ran and none was stopped."""
        if not duration_ns:
            return
        self.n_stops += 1
        self.n_over += duration_ns > self.limit_ns
        self.max_ns = max(self.max_ns, duration_ns)
        self.total_ns += duration_ns


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModule:
    """A module and what was found in it."""

    module: Module
    image: ModuleImage
    scan: SiteScan


ModuleKey = tuple[int, str, int]
"""Start, device and inode: its path may change under it, and another file may come there."""


def _module_key(module: Module) -> ModuleKey:
    """Return what identifies a mapped module."""
    first = module.mappings[0] if module.mappings else None
    device, inode = (first.device, first.inode) if first is not None else ("", 0)
    return int(module.start), device, inode


class Target:
    """The process, as far as the controller needs it.

    Args:
        pid: Its id.
        stop_timeout_s: How long its threads may take to stop.
        max_stop_s: How long they may stand for one batch of changes to its text.
        has_cpu_rows: Whether each CPU has a row of counters, or all share one.
    """

    def __init__(
        self,
        pid: int,
        *,
        stop_timeout_s: float,
        max_stop_s: float = 0.005,
        has_cpu_rows: bool = True,
    ) -> None:
        """Open its memory and read what it has mapped."""
        self.pid = pid
        self.start_time = read_start_time(pid)
        self.memory = RemoteMemory(pid)
        self.sharers = SharerFinder(pid)
        self.stops = StopLog(limit_ns=int(max_stop_s * 1e9))
        self.pace = Pace(max_ns=int(max_stop_s * 1e9))
        self.arenas: list[Arena] = []
        self.modules: dict[ModuleKey, LoadedModule] = {}
        self.unread: dict[ModuleKey, str] = {}
        """Modules that could not be read, and why."""
        self.stop_timeout_ns = int(stop_timeout_s * 1e9)
        self._has_cpu_rows = has_cpu_rows
        self._injection_code: InjectionCode | None = None
        self._flags_dead: dict[int, bool] = {}
        self._operand_dead: dict[tuple[int, str], bool] = {}
        self._maps: tuple[Mapping, ...] = ()
        self._code_starts: list[int] = []
        self._code_ends: list[int] = []
        self._code_inodes: list[int] = []
        self.read_maps()

    def close(self) -> None:
        """Close what is open here; the target is not touched."""
        for arena in self.arenas:
            arena.close()
        self.arenas.clear()
        self.memory.close()

    # --- memory map and modules

    def read_maps(self) -> tuple[Mapping, ...]:
        """Read the memory map anew."""
        if read_start_time(self.pid) != self.start_time:
            raise ProcessGone(self.pid)
        self._maps = read_maps(self.pid)
        code = [m for m in self._maps if m.is_executable and not _is_arena(m)]
        self._code_starts = [int(m.start) for m in code]
        self._code_ends = [int(m.end) for m in code]
        self._code_inodes = [0 if is_anonymous(m) else m.inode for m in code]
        return self._maps

    @property
    def maps(self) -> tuple[Mapping, ...]:
        """The memory map as last read."""
        return self._maps

    @property
    def code_maps(self) -> tuple[Mapping, ...]:
        """What of it can be executed: a heap that grows changes nothing here."""
        return tuple(mapping for mapping in self._maps if mapping.is_executable)

    def is_code(self, addr: int) -> bool:
        """Tell whether instructions can be fetched from an address (arenas left out)."""
        at = bisect.bisect_right(self._code_starts, addr) - 1
        return at >= 0 and addr < self._code_ends[at]

    def has_site(self, record: SiteRecord) -> bool:
        """Tell whether the file that a site was found in is still mapped there.

        As of the last ``read_maps``; what an unloaded module's text held is gone with it.
        """
        addr = record.site.addr
        at = bisect.bisect_right(self._code_starts, addr) - 1
        if at < 0 or addr >= self._code_ends[at]:
            return False
        if self._code_inodes[at] == 0:  # perhaps the program's copy of the text, and of our change
            code = read_entries(self.memory, [record.entry])[record.entry.addr]
            return is_same_but_disp(record.entry, code) or any(
                leads_into(record.entry, code, arena.addr, arena.end) for arena in self.arenas
            )
        return self._code_inodes[at] == record.inode

    def has_arena(self) -> bool:
        """Tell whether all our arenas are still mapped; an exec unmaps them."""
        starts = {m.start for m in self._maps}
        return all(arena.addr in starts for arena in self.arenas)

    def is_replaced(self) -> bool:
        """Tell whether the process runs another program than the one that was opened."""
        try:
            return not self.memory.is_current() and bool(read_maps(self.pid))
        except ProcessGone:
            return False

    def refresh_modules(self) -> tuple[list[LoadedModule], list[LoadedModule]]:
        """Find modules that came and went since the last call.

        Returns:
            (added, gone).
        """
        present = {_module_key(m): m for m in list_modules(self.pid, memory=self.memory)}
        self.unread = {key: why for key, why in self.unread.items() if key in present}
        gone = [self.modules.pop(key) for key in list(self.modules) if key not in present]
        added: list[LoadedModule] = []
        for key, module in present.items():
            if (
                key in self.modules
                or key in self.unread
                or module.name.startswith(f"memfd:{ARENA_NAME}")
            ):
                continue
            try:
                loaded = self._load(module)
            except ProcessGone:
                raise
            except OptpolineError as error:
                # Unloaded meanwhile, or no ELF file we understand: tried again when it changes.
                self.unread[key] = f"{module.path} left alone: {error}"
                continue
            self.modules[key] = loaded
            added.append(loaded)
        if added or gone:
            self._flags_dead.clear()
            self._operand_dead.clear()
        return added, gone

    def _load(self, module: Module) -> LoadedModule:
        """Scan one module."""
        elf = open_module(self.pid, module)
        try:
            image = ModuleImage.from_process(module, self.memory, elf)
        finally:
            if elf is not None:
                elf.close()
        return LoadedModule(module=module, image=image, scan=find_sites(image))

    def image_at(self, addr: int) -> ModuleImage | None:
        """Return the image of the module that an address lies in, or None."""
        loaded = self._loaded_at(addr)
        return None if loaded is None else loaded.image

    def _loaded_at(self, addr: int) -> LoadedModule | None:
        """Return the module that an address lies in, or None."""
        for loaded in self.modules.values():
            if loaded.module.start <= addr < loaded.module.end:
                return loaded
        return None

    def symbol_at(self, addr: int) -> str | None:
        """Return ``name`` or ``name+0x12`` for an address, or None."""
        image = self.image_at(addr)
        named = image.symbols.name_at(Addr(addr)) if image is not None else None
        if named is None:
            return None
        name, off = named
        return f"{name}+{off:#x}" if off else name

    # --- sites

    def make_records(self, loaded: LoadedModule) -> list[SiteRecord]:
        """Return records for the promotable sites of a module, with an arena in reach.

        Refused sites have none; they are reported from the scan.
        """
        sites = [site for site in loaded.scan.sites if site.refusal is None]
        if not sites:
            return []
        arena = self.arena_for(loaded, len(sites))
        inode = loaded.module.mappings[0].inode
        return [self._record(site, arena, inode) for site in sites]

    def _record(self, site: Site, arena: Arena, inode: int) -> SiteRecord:
        """Return a fresh record of one site."""
        entry = JournalEntry.of(site)
        return SiteRecord(
            site=site,
            arena=arena,
            state=SiteState.BASELINE,
            entry=entry,
            inode=inode,
            branch=entry.original,
        )

    def may_guard(self, record: SiteRecord, target: Addr) -> bool:
        """Tell whether a site's block may branch to a target directly.

        Notes a target that reads the flags in ``record.unsafe_targets`` and
        refuses the site: its block would destroy them; one that may read the operand
        in ``record.operand_targets``.
        """
        if not self.is_code(target):
            return False
        far = max(abs(target - record.arena.addr), abs(target - record.arena.near_end))
        if not is_within_reach(0, far):
            record.far_targets.add(target)
            return False
        if not self._is_operand_free(record.site, target):
            record.operand_targets.add(target)
        if record.site.kind is SiteKind.CALL or self._is_flags_dead(target):
            return True
        record.unsafe_targets.add(target)
        record.refuse(Refusal.FLAGS_LIVE)
        return False

    def guard_kin(self, record: SiteRecord) -> Hashable:
        """Return all of a site that ``may_guard`` goes by: where it is equal, so are verdicts."""
        site, arena = record.site, record.arena
        home = None
        if site.load is None:
            loaded = self._loaded_at(site.addr)
            home = (site.thunk.operand, None if loaded is None else loaded.module.start)
        return arena.addr, arena.near_end, site.kind, home

    def _is_operand_free(self, site: Site, target: Addr) -> bool:
        """Tell whether a site's block may leave anything in its operand's register at a target."""
        if site.load is not None:
            return True  # a register that the program does not use there, says its compiler
        # Where site and target are unloaded together no verdict on the target outlives it.
        is_near = self.image_at(target) is self.image_at(site.addr)
        return is_near and self._is_operand_dead(target, site.thunk.operand)

    def _is_flags_dead(self, target: Addr) -> bool:
        """Tell whether flags are dead at a jump's target; each is decoded once."""
        known = self._flags_dead.get(target)
        if known is None:
            image = self.image_at(target)
            known = image is not None and flags_dead_at(image, target)
            self._flags_dead[target] = known
        return known

    def _is_operand_dead(self, target: Addr, register: str) -> bool:
        """Tell whether a register is dead at a target; each is decoded once."""
        known = self._operand_dead.get((target, register))
        if known is None:
            image = self.image_at(target)
            known = image is not None and operand_dead_at(image, target, register)
            self._operand_dead[target, register] = known
        return known

    # --- arenas and stops

    def arena_for(self, loaded: LoadedModule, n_sites: int) -> Arena:
        """Return an arena that reaches a module, made now if there is none.

        Raises:
            ArenaError: if there is no room within reach, or a limit forbids it.
        """
        module = loaded.module
        for arena in self.arenas:
            span = max(arena.near_end, module.end) - min(arena.addr, module.start)
            if is_within_reach(0, span) and arena.has_room_for(n_sites):
                return arena
        n_cpus = read_n_possible_cpus() if self._has_cpu_rows else 0
        geometry = ArenaGeometry.for_sites(n_sites, n_cpus)
        for left in reversed(range(MAX_PLACES)):
            try:
                arena = self._make_arena(module, geometry)
                break
            except AddressTaken:
                if not left:
                    raise
        self.read_maps()
        return arena

    def _make_arena(self, module: Module, geometry: ArenaGeometry) -> Arena:
        """Map an arena where there is room for it now.

        Raises:
            AddressTaken: if a thread of the program was faster.
            ArenaError: if there is no room within reach, or a limit forbids it.
        """
        size, near_size = geometry.size, geometry.near_size
        start, end = self._reach_of(module)
        addr = choose_arena_addr(self.read_maps(), start, end, size, near_size)
        if addr is None:
            addr = choose_arena_addr(self._maps, module.start, module.end, size, near_size)
        if addr is None:
            raise ArenaError(
                f"process {self.pid} has no room for an arena of {geometry.size >> 10} KiB "
                f"within reach of {module.path}",
                hint="start it again: its mappings may then lie elsewhere",
            )
        controller_start = read_start_time(os.getpid())
        with self.stop(Wake.ONE_FOR_INJECTION) as stop:

            def make() -> Arena:
                arena = map_arena(
                    self.pid, stop, self.memory, addr, geometry, controller_start=controller_start
                )
                # Here: who is interrupted meanwhile knows of it all the same.
                self.arenas.append(arena)
                return arena

            return stop.run(make)

    def _reach_of(self, module: Module) -> tuple[int, int]:
        """Return a range to reach that includes neighbours a module may branch to."""
        near = [
            other.module
            for other in self.modules.values()
            if is_within_reach(other.module.start, module.end)
            and is_within_reach(other.module.end, module.start)
        ]
        return min(m.start for m in (module, *near)), max(m.end for m in (module, *near))

    @contextmanager
    def stop(self, wake: Wake = Wake.NONE) -> Iterator[Stop]:
        """Stop the target's threads for the length of the block, and note for how long.

        A stop that ends in an error counts as well, whether all threads stood or not.

        Raises:
            PermissionDenied: if one cannot be traced; it names a debugger that is attached.
        """
        if wake in (Wake.ALL, Wake.ONE_FOR_INJECTION) and self._injection_code is None:
            self._injection_code = find_injection_code(self.pid, self.memory)
        try:
            with stop_threads(
                self.pid,
                memory=self.memory,
                wake=wake,
                timeout_ns=self.stop_timeout_ns,
                code=self._injection_code,
                sharers=self.sharers,
                on_end=self.stops.add,
            ) as stop:
                yield stop
        except PermissionDenied as denied:
            # The kernel says no more than EPERM; who traces it is in /proc.
            raise explain_untraceable(self.pid, denied) from denied.__cause__

    def may_wake_all(self, *, may_delay: bool = False) -> bool:
        """Tell whether waking every sleeping thread would harm none of them.

        Args:
            may_delay: Whether a wait's timeout may begin again.
        """
        pids = (self.pid, *self.sharers.look())
        threads = [(pid, tid) for pid in pids for tid in _list_living(pid)]
        for process, tid in threads:
            try:
                state = read_thread_state(process, tid)
                # Whose work it does is asked last: one more file, and of few.
                if (
                    _may_be_harmed(process, state, may_delay=may_delay)
                    and read_state_char(process, tid) not in RUNS_NO_CODE
                ):
                    return False
            except ProcessGone:
                continue  # one thread that exited meanwhile; a whole process shows elsewhere
        return True


def _may_be_harmed(pid: int, state: ThreadState, *, may_delay: bool) -> bool:
    """Tell whether a thread sleeps in a call that it must not be woken from."""
    if state.where is not ThreadWhere.IN_SYSCALL:
        return False
    rank = rank_call(pid, state, asks=True)
    return rank is Disturbance.HARMFUL or (rank is Disturbance.TIMEOUT_AFRESH and not may_delay)


def _list_living(pid: int) -> tuple[int, ...]:
    """Return the threads of a process, none if it is gone."""
    try:
        return list_tids(pid)
    except ProcessGone:
        return ()


def _is_arena(mapping: Mapping) -> bool:
    """Tell whether a mapping is one of ours, of this or an earlier controller."""
    return mapping.path.startswith(f"/memfd:{ARENA_NAME}")
