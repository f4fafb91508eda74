# SPDX-License-Identifier: Apache-2.0
"""``build/torture.json``: what each row showed when it was last run.

A run replaces the rows that it ran and keeps the others, each with its date, seed and
scale, so that a full run can be done in pieces. A short run does not replace a full one:
the two are kept apart.
"""

from __future__ import annotations

import json
import os
import platform
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from torture.row import Outcome
from torture.tables import verdict_word

__all__ = ["SCHEMA_VERSION", "write_outcome"]

SCHEMA_VERSION = 1

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
JsonObject = dict[str, JsonValue]


def write_outcome(path: Path, outcome: Outcome, *, seed: int, is_full: bool) -> None:
    """Put a row's outcome into the file, in place of an older one of that name and kind."""
    run = "full" if is_full else "quick"
    runs = _read_runs(path)
    kept = runs.get(run)
    rows: JsonObject = dict(kept) if isinstance(kept, dict) else {}
    rows[outcome.row] = _row_object(outcome, seed)
    whole: JsonObject = {
        "schema_version": SCHEMA_VERSION,
        "machine": {"cores": os.cpu_count(), "kernel": platform.release()},
        "runs": {**runs, run: rows},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(whole, indent=1, ensure_ascii=False) + "\n")
    scratch.replace(path)


def _read_runs(path: Path) -> JsonObject:
    """Return the runs in the file; none if it is missing or not of our form."""
    try:
        whole = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    if not isinstance(whole, dict) or whole.get("schema_version") != SCHEMA_VERSION:
        return {}
    runs = whole.get("runs")
    return runs if isinstance(runs, dict) else {}


def _row_object(outcome: Outcome, seed: int) -> JsonObject:
    """Return a row's outcome as an object."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "seed": seed,
        "scale": outcome.scale,
        "seconds": round(outcome.seconds, 3),
        "verdict": "met" if outcome.is_met else "MISSED",
        "figures": [
            {**asdict(figure), "verdict": verdict_word(figure)} for figure in outcome.figures
        ],
        "notes": list(outcome.notes),
    }
