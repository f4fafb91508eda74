# SPDX-License-Identifier: Apache-2.0
"""``build/bench.json``: everything that was measured, group by group.

A run replaces the groups that it measured and keeps the others, each with its date, so
that a long benchmark can be done in pieces.
"""

from __future__ import annotations

import json
import os
import platform
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench import statistics
from bench.build import Variant
from bench.figures import Figure
from bench.paths import BUILD
from bench.statistics import Estimate
from bench.verdicts import group_mean, judge_group, judge_workload, peer_mean
from bench.workload import PROMOTED, Measured

__all__ = ["SCHEMA_VERSION", "figures_document", "group_document", "write_group"]

SCHEMA_VERSION = 1

JsonValue = None | bool | int | float | str | list["JsonValue"] | dict[str, "JsonValue"]
JsonObject = dict[str, JsonValue]


def group_document(group: str, rows: Sequence[Measured]) -> JsonObject:
    """Return the results of a group of workloads; times are in nanoseconds."""
    verdict = judge_group(group, rows)
    return {
        "recovered_geometric_mean": _interval(group_mean(rows)),
        "peer_recovered_mean": _interval(peer_mean(rows)),
        "bar": verdict.bar,
        "verdict": verdict.word,
        "workloads": [_workload_object(row) for row in rows],
    }


def figures_document(figures: Sequence[Figure]) -> JsonObject:
    """Return the figures of attaching."""
    return {
        "figures": [
            {
                "name": figure.name,
                "value": figure.value,
                "unit": figure.unit,
                "bar": figure.bar,
                "verdict": figure.verdict,
            }
            for figure in figures
        ]
    }


def write_group(path: Path, group: str, document: Mapping[str, JsonValue]) -> None:
    """Put a group into the file of results, in place of an older one of that name."""
    whole: JsonObject = {}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept.get("schema_version") == SCHEMA_VERSION:
            whole = kept
    groups = whole.get("groups")
    kept_groups = groups if isinstance(groups, dict) else {}
    date = datetime.now(UTC).isoformat(timespec="seconds")
    whole = {
        "schema_version": SCHEMA_VERSION,
        "machine": _machine(),
        "sources": _sources(),
        "groups": {**kept_groups, group: {"date": date, **document}},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps(whole, indent=1) + "\n")
    scratch.replace(path)


def _workload_object(row: Measured) -> JsonObject:
    """Return the results of one workload."""
    verdict = judge_workload(row)
    document: JsonObject = {
        "name": row.name,
        "medians": {name: _interval(statistics.median(row.samples[name])) for name in row.samples},
        "overhead": _interval(row.overhead),
        "bar": verdict.bar,
        "verdict": verdict.word,
        "learning_slowdown": row.learning_slowdown,
        "optpoline": None if row.summary is None else asdict(row.summary),
        "samples": {name: list(values) for name, values in row.samples.items()},
    }
    if PROMOTED in row.samples:
        document["recovered"] = _interval(row.recovered)
        document["loss"] = _interval(row.loss)
    if PROMOTED in row.samples and Variant.NO_TABLES.value in row.samples:
        document["recovered_without_jump_tables"] = _interval(
            statistics.recovered(
                row.of(Variant.NO_TABLES), row.of(Variant.RETPOLINE), row.samples[PROMOTED]
            )
        )
    return document


def _interval(estimate: Estimate | None) -> JsonValue:
    """Return an estimate as an object."""
    return None if estimate is None else asdict(estimate)


def _machine() -> JsonObject:
    """Say what was measured on."""
    model = ""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    compiler = shutil.which("gcc")
    version = ""
    if compiler:
        said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
        version = said.stdout.splitlines()[0] if said.stdout else ""
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "kernel": platform.release(),
        "compiler": version,
        "python": platform.python_version(),
    }


def _sources() -> JsonObject:
    """Say which sources were built, as recorded when they were fetched."""
    records = sorted((BUILD / "src").glob("*.json"))
    return {record.stem: json.loads(record.read_text()) for record in records}
