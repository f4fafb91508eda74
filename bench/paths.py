# SPDX-License-Identifier: Apache-2.0
"""Where the benchmarks keep things: sources of ours here, everything made below build/."""

from __future__ import annotations

from pathlib import Path

__all__ = ["BENCH", "BUILD", "OPTPOLINE", "RESULTS", "ROOT"]

BENCH = Path(__file__).resolve().parent
ROOT = BENCH.parent
BUILD = ROOT / "build" / "bench"
RESULTS = ROOT / "build" / "bench.json"
OPTPOLINE = ROOT / ".venv" / "bin" / "optpoline"
