# SPDX-License-Identifier: Apache-2.0
"""Where torture keeps things: sources of ours here, everything made below build/."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BUILD", "OPTPOLINE", "RESULTS", "ROOT", "TARGETS"]

TORTURE = Path(__file__).resolve().parent
ROOT = TORTURE.parent
TARGETS = TORTURE / "targets"
BUILD = ROOT / "build" / "torture"
RESULTS = ROOT / "build" / "torture.json"
OPTPOLINE = ROOT / ".venv" / "bin" / "optpoline"
