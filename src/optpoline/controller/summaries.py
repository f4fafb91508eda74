# SPDX-License-Identifier: Apache-2.0
"""Make summaries of sessions, and of programs that are only looked at."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from optpoline.controller.arguments import validate_pid
from optpoline.controller.baseline_memory import BaselineMemory
from optpoline.controller.declared_sites import read_declaring_image
from optpoline.controller.declared_summaries import summarise_declared
from optpoline.controller.left_arenas import is_controller_alive
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import (
    DeclaredSummary,
    ModuleSummary,
    ReclaimSummary,
    SessionState,
    SiteState,
    SiteSummary,
    Summary,
    TargetShare,
)
from optpoline.controller.target import LoadedModule, StopLog, Target
from optpoline.controller.wording import count_of
from optpoline.discover import ModuleImage, count_plain_indirect
from optpoline.discover import find_sites as scan_image
from optpoline.errors import NotesError, ProcessGone, TargetFault
from optpoline.model import Module, Site
from optpoline.patch.layout import ARENA_NAME
from optpoline.process.modules import list_modules, open_module
from optpoline.process.permissions import open_program
from optpoline.process.procfs import read_status

__all__ = ["SiteReport", "find_sites", "summarise"]

SymbolAt = Callable[[int], str | None]

MAX_TARGETS_SHOWN = 128

_STOPPED = "T"
"""Stopped by a signal, as ps(1) has it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteReport:
    """What ``find_sites`` found.

    Attributes:
        subject: The path, or the pid in decimal.
        modules: Modules looked at that have sites or thunks.
        sites: All sites in address order.
        notes: Sentences worth telling.
        declared: What the modules' sources declare, by module and address.
    """

    subject: str
    modules: tuple[ModuleSummary, ...]
    sites: tuple[SiteSummary, ...]
    notes: tuple[str, ...]
    declared: tuple[DeclaredSummary, ...] = ()


def find_sites(subject: int | str | Path) -> SiteReport:
    """Find the retpoline sites of a process or an ELF file, touching nothing.

    In a process that a controller works on, or has left promoted, the sites are those of
    its baseline, and their state is where they lead now.

    Args:
        subject: A pid, or the path of a file.

    Raises:
        UsageError: if it is neither a path nor a whole number from 1 up.
        ProcessGone: if there is no such process.
        PermissionDenied: if its memory may not be read.
        UnsupportedTarget: if it is no 64-bit x86 ELF file or process.
        NotesError: if a file's notes on declared sites are damaged or too new; in a process
            that is a note on the module.
    """
    if not isinstance(subject, str | Path):
        return _find_in_process(validate_pid(subject))
    image = ModuleImage.from_file(str(subject))
    return _report(str(subject), [(image.module, image)])


def _find_in_process(pid: int) -> SiteReport:
    """Find the sites of all modules of a process."""
    with open_program(pid) as memory:
        baseline = BaselineMemory(memory)
        images: list[tuple[Module, ModuleImage]] = []
        declaring: dict[int, ModuleImage] = {}
        for module in list_modules(pid):
            if _is_arena(module):
                continue
            elf = open_module(pid, module)
            images.append((module, ModuleImage.from_process(module, baseline, elf)))
            if elf is not None:
                elf.close()
            # Its text as in its file: static calls may lead elsewhere by now.
            declared = read_declaring_image(pid, module, memory)
            if declared is not None:
                declaring[module.start] = declared
        return _report(str(pid), images, baseline, declaring)


def _is_arena(module: Module) -> bool:
    """Tell whether a module is an arena's memfd."""
    return module.name.startswith(f"memfd:{ARENA_NAME}")


def _report(
    subject: str,
    images: Sequence[tuple[Module, ModuleImage]],
    baseline: BaselineMemory | None = None,
    declaring: Mapping[int, ModuleImage] | None = None,
) -> SiteReport:
    """Scan images and report.

    Args:
        subject: What they are of.
        images: Images.
        baseline: What a process's images are read from, None for a file.
        declaring: Images of a process's modules that declare anything, by their start.
    """
    loaded = [LoadedModule(module=m, image=i, scan=scan_image(i)) for m, i in images]
    declared: list[DeclaredSummary] = []
    damaged: list[str] = []
    for one in loaded:
        try:
            if declaring is None or one.module.start in declaring:
                image = one.image if declaring is None else declaring[one.module.start]
                declared += summarise_declared(image)
        except (NotesError, TargetFault) as error:
            if baseline is None:
                raise
            damaged.append(str(error))
    states = {} if baseline is None else baseline.read_states()
    sites = [
        _with_state(_site_summary(site, one.module, None, _no_symbol), states.get(site.addr))
        for one in loaded
        for site in one.scan.sites
    ]
    return SiteReport(
        subject=subject,
        modules=_module_summaries(loaded, [], count_plain=True),
        sites=tuple(sorted(sites, key=lambda site: site.address)),
        notes=(
            *scan_notes(loaded),
            *damaged,
            *(() if baseline is None else _arena_notes(baseline)),
        ),
        declared=tuple(declared),
    )


def _with_state(site: SiteSummary, state: SiteState | None) -> SiteSummary:
    """Say of a site where it leads now, if it is linked; a breakpoint over it counts more."""
    return site if state is None or site.refusal is not None else replace(site, state=state)


def _arena_notes(baseline: BaselineMemory) -> tuple[str, ...]:
    """Return sentences on whose work was found in a process."""
    headers = [arena.header for arena in baseline.arenas.values() if arena.header is not None]
    makers = {header.controller_pid: header for header in headers}
    return (
        *(
            f"controller {pid} ({'still running' if is_controller_alive(header) else 'gone'}) "
            "has linked sites here; listed is what they were before"
            for pid, header in makers.items()
        ),
        *baseline.describe_unreadable(),
    )


def scan_notes(loaded: Sequence[LoadedModule]) -> tuple[str, ...]:
    """Return sentences on what was found but cannot be promoted."""
    notes: list[str] = []
    for one in loaded:
        name, scan = one.module.name, one.scan
        if scan.n_inline:
            plural = "s" if scan.n_inline > 1 else ""
            notes.append(f"{name}: {scan.n_inline} inline retpoline{plural} cannot be promoted")
        if scan.n_via_plt:
            what = "branches take" if scan.n_via_plt > 1 else "branch takes"
            notes.append(f"{name}: {scan.n_via_plt} {what} another module's thunk by PLT")
    return tuple(notes)


def _no_symbol(_: int) -> None:
    """Name nothing."""


def _module_summaries(
    loaded: Sequence[LoadedModule],
    records: Sequence[SiteRecord],
    *,
    count_plain: bool = False,
) -> tuple[ModuleSummary, ...]:
    """Return summaries of the executable and of the modules that have sites or thunks.

    Args:
        loaded: The modules.
        records: Records of their sites.
        count_plain: Whether to decode the executable to count what it has instead.
    """
    refused = [record for record in records if record.refusal is not None]
    return tuple(
        ModuleSummary(
            path=one.module.path,
            n_sites=len(one.scan.sites),
            n_refused=sum(1 for site in one.scan.sites if site.refusal is not None)
            + sum(1 for record in refused if record.site.module == one.module.path),
            n_thunks=len(one.scan.thunks),
            n_plain=count_plain_indirect(one.image)
            if count_plain and (one.module.is_main or len(loaded) == 1)
            else None,
            n_inline=one.scan.n_inline,
        )
        for one in loaded
        if one.scan.sites
        or one.scan.thunks
        or (count_plain and (one.module.is_main or one.scan.n_inline))
    )


def summarise(
    target: Target,
    records: Sequence[SiteRecord],
    *,
    state: SessionState,
    learning_s: float,
    notes: tuple[str, ...],
    reclaim: ReclaimSummary,
) -> Summary:
    """Return how a session stands."""
    by_addr = {record.site.addr: record for record in records}
    sites: list[SiteSummary] = []
    for loaded in target.modules.values():
        for site in loaded.scan.sites:
            record = by_addr.get(site.addr)
            sites.append(_site_summary(site, loaded.module, record, target.symbol_at))
    sites.sort(key=lambda site: (-(site.rate_hz or 0.0), site.address))
    return Summary(
        pid=target.pid,
        state=state,
        modules=_module_summaries(list(target.modules.values()), records),
        sites=tuple(sites),
        promoted=sum(1 for record in records if record.state is SiteState.PROMOTED),
        hit_rate=_hit_rate(records),
        stops=target.stops.n_stops,
        stop_ms_max=target.stops.max_ns / 1e6,
        stop_ms_total=target.stops.total_ns / 1e6,
        learning_s=learning_s,
        relearned=sum(record.n_relearned for record in records),
        stop_ms_limit=target.stops.limit_ns / 1e6,
        stops_over_limit=target.stops.n_over,
        notes=(
            *notes,
            *scan_notes(list(target.modules.values())),
            *_far_notes(records),
            *_stopped_notes(target.pid),
            *_stop_notes(target.stops),
        ),
        reclaim=reclaim,
    )


def _far_notes(records: Sequence[SiteRecord]) -> tuple[str, ...]:
    """Return a sentence on sites whose targets are out of reach of a direct branch."""
    n_far = sum(1 for r in records if r.far_targets and r.state is SiteState.BASELINE)
    if not n_far:
        return ()
    return (
        f"the targets of {count_of(n_far, 'unpromoted site')} are more than 2 GiB away (in another "
        "module), beyond any direct branch",
    )


def _stopped_notes(pid: int) -> tuple[str, ...]:
    """Return a sentence on a program that a signal has stopped: nothing is learned of it."""
    try:
        if read_status(pid).state != _STOPPED:
            return ()
    except ProcessGone:
        return ()
    return (
        f"process {pid} is stopped (SIGCONT lets it run: kill -CONT {pid}); "
        "nothing is learned meanwhile",
    )


def _stop_notes(stops: StopLog) -> tuple[str, ...]:
    """Return a sentence on stops that took longer than they were to."""
    if not stops.n_over:
        return ()
    return (
        f"{stops.n_over} of {count_of(stops.n_stops, 'stop')} took longer than the "
        f"{stops.limit_ns / 1e6:g} ms asked for, the longest {stops.max_ns / 1e6:.1f} ms: "
        "busy CPUs, or many threads, make stops longer",
    )


def _hit_rate(records: Sequence[SiteRecord]) -> float | None:
    """Return the share of branches at promoted sites that take a guard."""
    hits = total = 0.0
    for record in records:
        hit_rate, rate_hz = record.hit_rate, record.rate_hz
        if record.state is SiteState.PROMOTED and hit_rate is not None and rate_hz is not None:
            hits += hit_rate * rate_hz
            total += rate_hz
    return hits / total if total else None


def _site_summary(
    site: Site, module: Module, record: SiteRecord | None, symbol_at: SymbolAt
) -> SiteSummary:
    """Return one site as users see it."""
    refusal = site.refusal or (record.refusal if record is not None else None)
    state = SiteState.BASELINE if record is None else record.state
    if refusal is not None:
        state = SiteState.REFUSED
    return SiteSummary(
        module=site.module,
        address=site.addr,
        offset=site.addr - module.load_bias,
        function=_function_name(site),
        kind=site.kind.value,
        operand=site.thunk.operand,
        thunk=site.thunk.symbol or hex(site.thunk.addr),
        state=state,
        refusal=refusal.value if refusal is not None else None,
        hit_rate=record.hit_rate if record is not None else None,
        rate_hz=record.rate_hz if record is not None else None,
        targets=_target_shares(record, symbol_at) if record is not None else (),
        table=site.table.name if site.table is not None else None,
        max_branches=site.max_guards,
        source=record.source if record is not None and state is SiteState.PROMOTED else None,
    )


def _function_name(site: Site) -> str | None:
    """Return ``name+0x12`` of a site, or None."""
    if site.function is None:
        return None
    off = site.addr - site.function_addr if site.function_addr is not None else 0
    return f"{site.function}+{off:#x}" if off else site.function


def _target_shares(record: SiteRecord, symbol_at: SymbolAt) -> tuple[TargetShare, ...]:
    """Return a site's targets, hottest first."""
    if record.known is None:
        return ()
    guarded = set(record.plan.targets) if record.plan is not None else set()
    return tuple(
        TargetShare(
            address=target, function=symbol_at(target), share=share, promoted=target in guarded
        )
        for target, share in list(record.known.shares().items())[:MAX_TARGETS_SHOWN]
    )
