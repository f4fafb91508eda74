# SPDX-License-Identifier: Apache-2.0
"""What a session can say about itself, as frozen records ready to be shown or written.

Every front end (text, JSON, later a live screen) renders these; none of them
looks into the session.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import assert_never

__all__ = [
    "BranchSource",
    "ChildSummary",
    "DeclaredKind",
    "DeclaredSummary",
    "DetachOutcome",
    "DetachResult",
    "KeyState",
    "KeySummary",
    "LeftBehind",
    "ModuleSummary",
    "SessionState",
    "SiteState",
    "SiteSummary",
    "StaticCallSummary",
    "Summary",
    "TargetShare",
]


class SessionState(Enum):
    """Where a session stands."""

    ATTACHED = "attached"
    LEARNING = "learning"
    PROMOTED = "promoted"
    WATCHING = "watching"
    RESTORED = "restored"
    PARTLY_RESTORED = "partly_restored"
    """Detached, but some sites could not be restored; the promotions there keep working."""
    LEFT = "left"
    """Detached on purpose with the promotions working."""
    EXITED = "exited"
    """The target exited by itself."""
    EXECED = "execed"
    """The target replaced its program; nothing of ours is left in it."""

    @classmethod
    def after(cls, outcome: DetachOutcome) -> SessionState:
        """Return where a session stands after letting go."""
        match outcome:
            case DetachOutcome.CLEAN | DetachOutcome.ARENA_LEFT:
                return cls.RESTORED
            case DetachOutcome.LEFT:
                return cls.LEFT
            case DetachOutcome.GONE:
                return cls.EXITED
            case DetachOutcome.FOREIGN_BYTES | DetachOutcome.INCOMPLETE:
                return cls.PARTLY_RESTORED
            case _:
                assert_never(outcome)


class SiteState(Enum):
    """Where a site's branch leads now."""

    BASELINE = "baseline"
    LEARNING = "learning"
    PROMOTED = "promoted"
    REFUSED = "refused"


class BranchSource(Enum):
    """Whose counts a site's branches are made of."""

    SITE = "site"
    """Its own."""
    TABLE = "table"
    """Those of its table of dynamic calls: it has not counted enough itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetShare:
    """One target of a site and its share of the site's branches when last sampled.

    Attributes:
        address: Absolute address in the target process.
        function: ``name`` or ``name+0x12``, or None.
        share: 0..1 of all branches counted at the site in its last window; of those of its
            table where its branches come from there (``SiteSummary.source``).
        promoted: Whether a guard of the site's block leads to it.
    """

    address: int
    function: str | None
    share: float
    promoted: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteSummary:
    """One site as users see it.

    Attributes:
        module: Path of its module.
        address: Absolute address in the target process (in a file: p_vaddr).
        offset: Address minus the module's load bias.
        function: ``name+0x12``, or None.
        kind: "call", "jump" or "cond_jump".
        operand: Register that holds the target.
        thunk: Name of the thunk, or its address in hex.
        state: Where its branch leads now.
        refusal: Why it is never promoted, or None.
        hit_rate: Share of its branches that took a guard when last sampled, or None.
        rate_hz: Branches a second when last sampled, or None.
        targets: Hottest first.
        table: Name of the table of dynamic calls that it is of, or None.
        max_branches: Branches that its source allows at most, 0 for any number.
        source: Whose counts its branches are made of; None if it is not promoted.
    """

    module: str
    address: int
    offset: int
    function: str | None
    kind: str
    operand: str
    thunk: str
    state: SiteState
    refusal: str | None
    hit_rate: float | None
    rate_hz: float | None
    targets: tuple[TargetShare, ...]
    table: str | None = None
    max_branches: int = 0
    source: BranchSource | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSummary:
    """One module and what was found in it.

    Attributes:
        path: As the target names it.
        n_sites: Retpoline sites.
        n_refused: Those of them that are never promoted.
        n_thunks: Thunks.
        n_plain: Plain indirect branches (reported, never touched), or None if not counted.
        n_inline: Retpolines written out in place, which cannot be promoted.
    """

    path: str
    n_sites: int
    n_refused: int
    n_thunks: int
    n_plain: int | None
    n_inline: int = 0


class DeclaredKind(Enum):
    """What the source declares; the values are what users see."""

    KEY = "key"
    BRANCH = "branch"
    STATIC_CALL = "static_call"
    CALL = "call"
    TARGET = "target"
    DYNAMIC_CALL = "dynamic_call"


@dataclass(frozen=True, slots=True, kw_only=True)
class DeclaredSummary:
    """Something that the source of a module declares (``optpoline.h``, compiler plugin).

    Attributes:
        module: Path of the module.
        address: Of its count (key), its instruction (branch, call, dynamic call), its
            trampoline (static call) or the function itself (target).
        offset: Address minus the module's load bias.
        kind: What it is.
        name: Of the key, static call or table; None for a call that has none.
        type: Its type as written in the source; for a target the target's name; or None.
        function: The function it is in, or None.
        file: Source file, or None.
        line: Line in it, or None.
        size: Of its instruction in bytes, 0 where it has none.
        begins_on: Whether a key begins enabled, a branch as a jump; None for all else.
        problem: Why it cannot be changed, or None.
    """

    module: str
    address: int
    offset: int
    kind: DeclaredKind
    name: str | None
    type: str | None
    function: str | None
    file: str | None
    line: int | None
    size: int
    begins_on: bool | None = None
    problem: str | None = None


class KeyState(Enum):
    """What a static key is set to."""

    OFF = "off"
    ON = "on"
    MIXED = "mixed"
    """Its count and its branches contradict each other, or two modules do: a controller was
    killed while it changed them, or a module was loaded since. Setting it again ends that."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KeySummary:
    """A static key of a process, all of its modules together.

    Attributes:
        name: What it is called.
        state: What it is set to.
        begins_on: Whether it begins enabled.
        count: How often it is enabled.
        n_branches: Branches on it.
        is_torn: Whether its count and its branches contradict each other in one module.
        modules: Paths of the modules that have it.
        file: Source file, or None.
        line: Line in it, or None.
    """

    name: str
    state: KeyState
    begins_on: bool
    count: int
    n_branches: int
    is_torn: bool
    modules: tuple[str, ...]
    file: str | None
    line: int | None

    @property
    def is_set(self) -> bool:
        """Whether it is not as it begins."""
        return self.state is not (KeyState.ON if self.begins_on else KeyState.OFF)


@dataclass(frozen=True, slots=True, kw_only=True)
class StaticCallSummary:
    """A static call of a process, all of its modules together.

    Attributes:
        name: What it is called.
        target: What it calls: a name of the source or a symbol, else an address in hex; None
            if modules, or the calls in one, contradict each other.
        default: What it calls at first; "NULL" for nothing, "0" for what returns zero.
        targets: What it may be given, by the source; the default first.
        is_out_of_line: Whether only its trampoline is changed.
        n_calls: Calls that are changed themselves.
        is_set: Whether it is not as it begins.
        is_torn: Whether its trampoline and its calls contradict each other in one module.
        modules: Paths of the modules that have it.
        file: Source file, or None.
        line: Line in it, or None.
    """

    name: str
    target: str | None
    default: str
    targets: tuple[str, ...]
    is_out_of_line: bool
    n_calls: int
    is_set: bool
    is_torn: bool
    modules: tuple[str, ...]
    file: str | None
    line: int | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ReclaimSummary:
    """What became of blocks that were replaced.

    Attributes:
        blocks_retired: Blocks that nothing led to any more.
        blocks_reclaimed: Those of them whose memory was freed, after a grace period.
        blocks_reused: Blocks that were written to memory freed before.
        grace_periods: Grace periods that ended.
        bytes_poisoned: Bytes filled with int3 when they were freed.
        holders: Threads that held up the grace period at the last look.
        is_search_refused: Whether the program's memory is too large to be searched for
            saved contexts: then nothing is reused.
    """

    blocks_retired: int = 0
    blocks_reclaimed: int = 0
    blocks_reused: int = 0
    grace_periods: int = 0
    bytes_poisoned: int = 0
    holders: tuple[int, ...] = ()
    is_search_refused: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """A whole session at one moment.

    Attributes:
        pid: The target.
        state: Where the session stands.
        modules: Modules with sites.
        sites: Every site, hottest first, then by address.
        promoted: Number of sites that lead to a promoted block.
        hit_rate: Share of branches at promoted sites that took a guard when last sampled, or None.
        stops: Times the target's threads were stopped.
        stop_ms_max: Longest of them, first interrupt to last detach.
        stop_ms_total: Sum of them.
        stop_ms_limit: What a stop was to take at most (``Config.max_stop_s``); None where
            there was no session.
        stops_over_limit: Stops that took longer.
        learning_s: Seconds during which any site led to a learning block.
        relearned: How often a promoted site was promoted anew because its targets changed.
        notes: Sentences worth telling (what was left out, and why).
        reclaim: What became of blocks that were replaced.
    """

    pid: int
    state: SessionState
    modules: tuple[ModuleSummary, ...]
    sites: tuple[SiteSummary, ...]
    promoted: int
    hit_rate: float | None
    stops: int
    stop_ms_max: float
    stop_ms_total: float
    learning_s: float
    relearned: int
    notes: tuple[str, ...]
    reclaim: ReclaimSummary = field(default_factory=ReclaimSummary)
    stop_ms_limit: float | None = None
    stops_over_limit: int = 0


class DetachOutcome(Enum):
    """How letting go ended."""

    CLEAN = "clean"
    """Text restored and checked, arenas unmapped."""
    ARENA_LEFT = "arena_left"
    """Text restored and checked; an arena stays mapped because a thread may still be in it."""
    FOREIGN_BYTES = "foreign_bytes"
    """Some sites hold another patcher's bytes and were left as they are."""
    INCOMPLETE = "incomplete"
    """Some sites still lead into an arena: a debugger traces the threads, they could not
    be stopped in time, or a site's bytes cross a cache line and a thread sleeps in a call
    that must not be interrupted. Letting go again later finishes it."""
    LEFT = "left"
    """Nothing restored, on purpose."""
    GONE = "gone"
    """The target exited or replaced its program: nothing to undo."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChildSummary:
    """A forked child of the target that has its arenas mapped, after letting go.

    Attributes:
        pid: The child.
        kept: Sites of it that lead into an arena still; None if it may not be read.
        restored: Sites of it that were put back, which is done if children are followed.
    """

    pid: int
    kept: int | None
    restored: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class DetachResult:
    """What letting go did.

    Attributes:
        outcome: How it ended.
        restored: Sites whose bytes were put back (and read back equal).
        foreign: Addresses of sites left alone because of another patcher's bytes.
        notes: Sentences worth telling.
        children: Forked children that were restored, or keep something.
    """

    outcome: DetachOutcome
    restored: int
    foreign: tuple[int, ...]
    notes: tuple[str, ...]
    children: tuple[ChildSummary, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class LeftBehind:
    """What an earlier controller left in a process (``status``).

    Attributes:
        pid: The target.
        controller_pid: Controller that made it, as it recorded itself.
        controller_alive: Whether that controller still runs.
        arenas: Number of arenas mapped.
        sites: Sites whose branch leads into an arena now.
        baseline: Journalled sites that hold their baseline bytes.
        foreign: Journalled sites with other bytes.
        site_addresses: (address, "patched" | "baseline" | "foreign") each.
        settings: Static keys and calls that are not as they begin, such as "trace=on".
    """

    pid: int
    controller_pid: int
    controller_alive: bool
    arenas: int
    sites: int
    baseline: int
    foreign: int
    site_addresses: tuple[tuple[int, str], ...]
    settings: tuple[str, ...] = ()

    @property
    def is_only_set(self) -> bool:
        """Whether there is nothing but settings: no arena, and nothing of one."""
        return bool(self.settings) and not self.controller_pid and not self.arenas
