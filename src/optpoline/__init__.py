# SPDX-License-Identifier: Apache-2.0
"""Give running programs back the speed that Spectre-safe indirect branches cost.

>>> import optpoline
>>> with optpoline.attach(pid) as session:  # doctest: +SKIP
...     session.learn(seconds=1)
...     session.promote()
...     session.watch(seconds=60)

Names are imported when first used (PEP 562): ``optpoline --help`` needs none.
"""

from __future__ import annotations

# Not typing's, whose import takes longer than all that the command does before it is ready
# for Ctrl-C; type checkers know the name.
TYPE_CHECKING = False

if TYPE_CHECKING:
    from optpoline.controller.audit import audit
    from optpoline.controller.audit_report import (
        AuditReport,
        Fault,
        FaultKind,
        ForeignChange,
        ForeignKind,
    )
    from optpoline.controller.config import Config
    from optpoline.controller.declared_handles import KeyHandle, StaticCallHandle, Transaction
    from optpoline.controller.declared_program import DeclaredProgram, declared
    from optpoline.controller.events import Event, EventKind
    from optpoline.controller.session import Session, attach
    from optpoline.controller.summaries import SiteReport, find_sites
    from optpoline.controller.summary import (
        BranchSource,
        ChildSummary,
        DeclaredKind,
        DeclaredSummary,
        DetachOutcome,
        DetachResult,
        KeyState,
        KeySummary,
        LeftBehind,
        ModuleSummary,
        ReclaimSummary,
        SessionState,
        SiteState,
        SiteSummary,
        StaticCallSummary,
        Summary,
        TargetShare,
    )
    from optpoline.controller.takeover import read_status, restore
    from optpoline.errors import (
        ArenaError,
        AttachError,
        ControllerActive,
        NoSites,
        NotesError,
        OptpolineError,
        PermissionDenied,
        ProcessGone,
        SiteChanged,
        StopTimeout,
        TransactionTimeout,
        UnsupportedTarget,
        UsageError,
    )
    from optpoline.learn.counting import SiteCounts
    from optpoline.model import Count

__all__ = [
    "ArenaError",
    "AttachError",
    "AuditReport",
    "BranchSource",
    "ChildSummary",
    "Config",
    "ControllerActive",
    "Count",
    "DeclaredKind",
    "DeclaredProgram",
    "DeclaredSummary",
    "DetachOutcome",
    "DetachResult",
    "Event",
    "EventKind",
    "Fault",
    "FaultKind",
    "ForeignChange",
    "ForeignKind",
    "KeyHandle",
    "KeyState",
    "KeySummary",
    "LeftBehind",
    "ModuleSummary",
    "NoSites",
    "NotesError",
    "OptpolineError",
    "PermissionDenied",
    "ProcessGone",
    "ReclaimSummary",
    "Session",
    "SessionState",
    "SiteChanged",
    "SiteCounts",
    "SiteReport",
    "SiteState",
    "SiteSummary",
    "StaticCallHandle",
    "StaticCallSummary",
    "StopTimeout",
    "Summary",
    "TargetShare",
    "Transaction",
    "TransactionTimeout",
    "UnsupportedTarget",
    "UsageError",
    "attach",
    "audit",
    "declared",
    "find_sites",
    "read_status",
    "restore",
]

_MODULES = {
    "ArenaError": "errors",
    "AttachError": "errors",
    "AuditReport": "controller.audit_report",
    "Config": "controller.config",
    "ControllerActive": "errors",
    "Count": "model",
    "DeclaredProgram": "controller.declared_program",
    "Event": "controller.events",
    "EventKind": "controller.events",
    "Fault": "controller.audit_report",
    "FaultKind": "controller.audit_report",
    "ForeignChange": "controller.audit_report",
    "ForeignKind": "controller.audit_report",
    "KeyHandle": "controller.declared_handles",
    "NoSites": "errors",
    "NotesError": "errors",
    "OptpolineError": "errors",
    "PermissionDenied": "errors",
    "ProcessGone": "errors",
    "Session": "controller.session",
    "SiteChanged": "errors",
    "SiteCounts": "learn.counting",
    "SiteReport": "controller.summaries",
    "StaticCallHandle": "controller.declared_handles",
    "StopTimeout": "errors",
    "Transaction": "controller.declared_handles",
    "TransactionTimeout": "errors",
    "UnsupportedTarget": "errors",
    "UsageError": "errors",
    "attach": "controller.session",
    "audit": "controller.audit",
    "declared": "controller.declared_program",
    "find_sites": "controller.summaries",
    "read_status": "controller.takeover",
    "restore": "controller.takeover",
}
"""Where each name is; those not listed are records of controller.summary."""


def __getattr__(name: str) -> object:
    """Import a public name on first use."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    module = import_module(f"{__name__}.{_MODULES.get(name, 'controller.summary')}")
    value: object = getattr(module, name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """Name what may be imported, whether or not it was: consoles complete it."""
    return sorted({*globals(), *__all__})
