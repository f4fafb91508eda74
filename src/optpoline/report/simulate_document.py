# SPDX-License-Identifier: Apache-2.0
"""The documents that ``simulate`` and ``record`` write with ``--json``."""

from __future__ import annotations

from collections.abc import Sequence

from optpoline.controller.summary import DetachResult
from optpoline.controller.tracing import RecordTotals
from optpoline.report.json_document import SCHEMA_VERSION, JsonObject, detach_document
from optpoline.simulate.compare import Comparison
from optpoline.simulate.outcome import Outcome
from optpoline.simulate.projection import Measured, Projection

__all__ = ["projection_document", "record_document", "simulation_document"]


def simulation_document(comparison: Comparison) -> JsonObject:
    """Return what ``simulate`` writes."""
    work = comparison.workload
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "simulate",
        "workload": work.name,
        "n_sites": len(work.sites),
        "n_branches": round(work.n_branches),
        "seconds": work.seconds,
        "n_changes": comparison.n_changes,
        "retpoline_cycles": comparison.retpoline_cycles,
        "notes": list(work.notes),
        "best": comparison.best.policy,
        "policies": [_outcome_object(outcome) for outcome in comparison.outcomes],
        "ideals": [_outcome_object(outcome) for outcome in comparison.ideals],
    }


def _outcome_object(outcome: Outcome) -> JsonObject:
    """One policy, or one ideal."""
    replay, adaptation = outcome.replay, outcome.adaptation
    return {
        "name": outcome.policy,
        "hit_rate": outcome.hit_ratio,
        "cycles": outcome.cycles,
        "watch_cycles": outcome.watch_cycles,
        "promoted": None if replay is None else replay.n_promoted,
        "repromoted": None if replay is None else replay.n_repromoted,
        "demoted": None if replay is None else replay.n_demoted,
        "windows": None if replay is None else replay.n_windows,
        "learning_windows": None if replay is None else replay.n_learning,
        "changes_missed": adaptation.n_missed,
        "adapted_s_median": adaptation.median_s,
        "adapted_s_max": adaptation.max_s,
        "code_size": None if replay is None else replay.memory.peak_code_size,
        "code_written_size": None if replay is None else replay.memory.written_code_size,
        "table_size": None if replay is None else replay.memory.peak_table_size,
    }


def projection_document(
    policy: str, measured: Measured, projections: Sequence[Projection]
) -> JsonObject:
    """Return what ``simulate --project`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "simulate",
        "policy": policy,
        "measured": {
            "poll_s": [{"sites": n, "seconds": seconds} for n, seconds in measured.poll_s],
            "read_cell_s": measured.read_cell_s,
            "decide_s": measured.decide_s,
        },
        "projections": [
            {
                "sites": one.n_sites,
                "cpus": one.n_cpus,
                "table_reserved_size": one.reserved_size,
                "table_used_size": one.table_size,
                "code_size": one.code_size,
                "poll_cpu_ratio": one.poll_ratio,
                "window_cpu_ratio": one.window_ratio,
                "windows_hz": one.windows_hz,
            }
            for one in projections
        ],
    }


def record_document(
    pid: int,
    path: str,
    totals: RecordTotals,
    detach: DetachResult,
    exit_status: int | None,
) -> JsonObject:
    """Return what ``record`` writes.

    Args:
        pid: The process.
        path: The trace file.
        totals: What was recorded.
        detach: How letting go ended.
        exit_status: What the started command ended with, or None.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "record",
        "pid": pid,
        "trace": path,
        "n_sites": totals.n_sites,
        "n_targets": totals.n_targets,
        "n_bursts": totals.n_bursts,
        "n_branches": totals.n_branches,
        "n_dropped": totals.n_dropped,
        "n_unknown": totals.n_unknown,
        "seconds": totals.seconds,
        "target_gone": totals.is_gone,
        "exit_status": exit_status,
        "detach": detach_document(pid, detach)["detach"],
        "notes": list(totals.notes),
    }
