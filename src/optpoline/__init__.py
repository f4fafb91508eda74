# SPDX-License-Identifier: Apache-2.0
"""Give running programs back the speed that Spectre-safe indirect branches cost.

>>> import optpoline
>>> with optpoline.attach(pid) as session:  # doctest: +SKIP
...     session.learn(seconds=1)
...     session.promote()
...     session.watch(seconds=60)
"""

from optpoline.controller.config import Config
from optpoline.controller.events import Event, EventKind
from optpoline.controller.session import Session, attach
from optpoline.controller.summaries import SiteReport, find_sites
from optpoline.controller.summary import (
    DetachOutcome,
    DetachResult,
    LeftBehind,
    ModuleSummary,
    SessionState,
    SiteState,
    SiteSummary,
    Summary,
    TargetShare,
)
from optpoline.controller.takeover import read_status, restore
from optpoline.errors import OptpolineError

__all__ = [
    "Config",
    "DetachOutcome",
    "DetachResult",
    "Event",
    "EventKind",
    "LeftBehind",
    "ModuleSummary",
    "OptpolineError",
    "Session",
    "SessionState",
    "SiteReport",
    "SiteState",
    "SiteSummary",
    "Summary",
    "TargetShare",
    "attach",
    "find_sites",
    "read_status",
    "restore",
]
