# SPDX-License-Identifier: Apache-2.0
"""The records to render, where the renderers look for them."""

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

__all__ = [
    "DetachOutcome",
    "DetachResult",
    "LeftBehind",
    "ModuleSummary",
    "SessionState",
    "SiteState",
    "SiteSummary",
    "Summary",
    "TargetShare",
]
