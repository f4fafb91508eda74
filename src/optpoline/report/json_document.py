# SPDX-License-Identifier: Apache-2.0
"""The documents that ``--json`` writes, field by field.

Every document is one object whose first member is ``schema_version``. Each
record has its own writer that spells the fields out, so that renaming an
attribute can never rename a field. ``docs/json.md`` says what each means.

Invariants: addresses are strings ("0x401136": a JSON number loses digits above
2**53), ratios are 0..1, an unknown value is null, names are as in the symbol table.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence

from optpoline.controller.audit_report import AuditReport
from optpoline.controller.summary import (
    ChildSummary,
    DeclaredSummary,
    DetachResult,
    KeySummary,
    LeftBehind,
    ModuleSummary,
    ReclaimSummary,
    SiteSummary,
    StaticCallSummary,
    Summary,
    TargetShare,
)
from optpoline.errors import OptpolineError
from optpoline.process.checks import Check

__all__ = [
    "SCHEMA_VERSION",
    "JsonObject",
    "JsonValue",
    "audit_document",
    "checks_document",
    "detach_document",
    "encode_document",
    "error_document",
    "keys_document",
    "session_document",
    "sites_document",
    "static_calls_document",
    "status_document",
]

SCHEMA_VERSION = 1
"""Raised when a field is removed or changes its meaning, not when one is added."""

JsonValue = None | bool | int | float | str | Sequence["JsonValue"] | Mapping[str, "JsonValue"]
JsonObject = Mapping[str, JsonValue]

_ERROR_KINDS = {
    2: "usage",
    3: "no_sites",
    4: "target_gone",
    5: "permission",
    6: "unsupported",
    7: "refused",
    126: "not_executable",
    127: "not_found",
}


def encode_document(document: JsonObject) -> str:
    """Return a document as text, ending in a newline.

    Raises:
        ValueError: if a number is not finite, which JSON cannot say.
    """
    return json.dumps(document, indent=2, allow_nan=False) + "\n"


def session_document(
    summary: Summary, detach: DetachResult | None, *, command: str, exit_status: int | None = None
) -> JsonObject:
    """Return what ``attach`` and ``run`` write.

    Args:
        summary: The session.
        detach: How letting go ended, or None if there was nothing to let go.
        command: The verb.
        exit_status: What the started command ended with (``run``), or None.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "command": command,
        "pid": summary.pid,
        "state": summary.state.value,
        "n_sites": len(summary.sites),
        "promoted": summary.promoted,
        "hit_rate": summary.hit_rate,
        "stops": summary.stops,
        "stop_ms_max": summary.stop_ms_max,
        "stop_ms_total": summary.stop_ms_total,
        "stop_ms_limit": summary.stop_ms_limit,
        "stops_over_limit": summary.stops_over_limit,
        "learning_s": summary.learning_s,
        "relearned": summary.relearned,
        "reclaim": _reclaim_object(summary.reclaim),
        "exit_status": exit_status,
        "detach": None if detach is None else _detach_object(detach),
        "notes": list(summary.notes),
        "modules": [_module_object(module) for module in summary.modules],
        "sites": [_site_object(site) for site in summary.sites],
    }


def sites_document(
    target: str,
    modules: Sequence[ModuleSummary],
    sites: Sequence[SiteSummary],
    notes: Sequence[str],
    declared: Sequence[DeclaredSummary] = (),
) -> JsonObject:
    """Return what ``sites`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "sites",
        "target": target,
        "n_sites": len(sites),
        "notes": list(notes),
        "modules": [_module_object(module) for module in modules],
        "sites": [_site_object(site) for site in sites],
        "declared": [_declared_object(one) for one in declared],
    }


def status_document(pid: int, left: LeftBehind | None) -> JsonObject:
    """Return what ``status`` writes; ``left`` is None where nothing is left."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "status",
        "pid": pid,
        "left_behind": None if left is None else _left_behind_object(left),
    }


def detach_document(pid: int, result: DetachResult | None) -> JsonObject:
    """Return what ``detach`` writes; ``result`` is None where nothing was left."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "detach",
        "pid": pid,
        "detach": None if result is None else _detach_object(result),
    }


def checks_document(
    pid: int | None, machine: Sequence[Check], target: Sequence[Check], exit_code: int
) -> JsonObject:
    """Return what ``doctor`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "doctor",
        "pid": pid,
        "attachable": exit_code == 0,
        "exit_code": exit_code,
        "machine": [_check_object(check) for check in machine],
        "target": [_check_object(check) for check in target],
    }


def keys_document(pid: int, keys: Sequence[KeySummary]) -> JsonObject:
    """Return what ``key`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "key",
        "pid": pid,
        "keys": [_key_object(key) for key in keys],
    }


def static_calls_document(pid: int, calls: Sequence[StaticCallSummary]) -> JsonObject:
    """Return what ``static-call`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "static-call",
        "pid": pid,
        "static_calls": [_static_call_object(call) for call in calls],
    }


def _key_object(key: KeySummary) -> JsonObject:
    """One static key."""
    return {
        "name": key.name,
        "state": key.state.value,
        "begins_on": key.begins_on,
        "count": key.count,
        "n_branches": key.n_branches,
        "torn": key.is_torn,
        "modules": list(key.modules),
        "file": key.file,
        "line": key.line,
    }


def _static_call_object(call: StaticCallSummary) -> JsonObject:
    """One static call."""
    return {
        "name": call.name,
        "target": call.target,
        "default": call.default,
        "targets": list(call.targets),
        "out_of_line": call.is_out_of_line,
        "n_calls": call.n_calls,
        "set": call.is_set,
        "torn": call.is_torn,
        "modules": list(call.modules),
        "file": call.file,
        "line": call.line,
    }


def audit_document(report: AuditReport) -> JsonObject:
    """Return what ``check`` writes."""
    return {
        "schema_version": SCHEMA_VERSION,
        "command": "check",
        "pid": report.pid,
        "sound": report.is_sound,
        "arenas": report.arenas,
        "controller_pid": report.controller_pid,
        "controller_alive": report.controller_alive,
        "promoted": report.promoted,
        "baseline": report.baseline,
        "gone": report.gone,
        "blocks": report.blocks,
        "retired": report.retired,
        "n_modules": report.modules,
        "faults": [
            {"kind": one.kind.value, "address": hex(one.address), "sentence": one.sentence}
            for one in report.faults
        ],
        "foreign_changes": [
            {
                "kind": one.kind.value,
                "address": hex(one.address),
                "size": one.size,
                "module": one.module,
            }
            for one in report.foreign_changes
        ],
        "settings": list(report.settings),
        "notes": list(report.notes),
    }


def error_document(error: OptpolineError, exit_code: int) -> JsonObject:
    """Return what is written in place of any other document when a command fails.

    Args:
        error: What went wrong.
        exit_code: What the process exits with; for ``run`` not the error's own, and of a
            program that could not be started (126, 127) it alone says so.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "error": {
            "kind": _ERROR_KINDS.get(exit_code, _ERROR_KINDS.get(error.exit_code, "other")),
            "exit_code": exit_code,
            "message": error.message,
            "hint": error.hint,
        },
    }


def _module_object(module: ModuleSummary) -> JsonObject:
    """One module."""
    return {
        "path": module.path,
        "n_sites": module.n_sites,
        "n_refused": module.n_refused,
        "n_thunks": module.n_thunks,
        "n_inline": module.n_inline,
        "n_plain": module.n_plain,
    }


def _reclaim_object(reclaim: ReclaimSummary) -> JsonObject:
    """What became of blocks that were replaced."""
    return {
        "blocks_retired": reclaim.blocks_retired,
        "blocks_reclaimed": reclaim.blocks_reclaimed,
        "blocks_reused": reclaim.blocks_reused,
        "grace_periods": reclaim.grace_periods,
        "bytes_poisoned": reclaim.bytes_poisoned,
        "holders": list(reclaim.holders),
        "search_refused": reclaim.is_search_refused,
    }


def _site_object(site: SiteSummary) -> JsonObject:
    """One site."""
    return {
        "module": site.module,
        "address": hex(site.address),
        "offset": hex(site.offset),
        "function": site.function,
        "kind": site.kind,
        "operand": site.operand,
        "thunk": site.thunk,
        "state": site.state.value,
        "refusal": site.refusal,
        "hit_rate": site.hit_rate,
        "rate_hz": site.rate_hz,
        "targets": [_target_object(target) for target in site.targets],
        "table": site.table,
        "max_branches": site.max_branches,
        "branches_from": None if site.source is None else site.source.value,
    }


def _declared_object(one: DeclaredSummary) -> JsonObject:
    """Something that the source declares."""
    return {
        "module": one.module,
        "address": hex(one.address),
        "offset": hex(one.offset),
        "kind": one.kind.value,
        "name": one.name,
        "type": one.type,
        "function": one.function,
        "file": one.file,
        "line": one.line,
        "size": one.size,
        "begins_on": one.begins_on,
        "problem": one.problem,
    }


def _target_object(target: TargetShare) -> JsonObject:
    """One target of a site."""
    return {
        "address": hex(target.address),
        "function": target.function,
        "share": target.share,
        "promoted": target.promoted,
    }


def _detach_object(result: DetachResult) -> JsonObject:
    """How letting go ended."""
    return {
        "outcome": result.outcome.value,
        "restored": result.restored,
        "foreign": [hex(address) for address in result.foreign],
        "notes": list(result.notes),
        "children": [_child_object(child) for child in result.children],
    }


def _child_object(child: ChildSummary) -> JsonObject:
    """A forked child that was restored, or keeps promotions."""
    return {"pid": child.pid, "kept": child.kept, "restored": child.restored}


def _left_behind_object(left: LeftBehind) -> JsonObject:
    """What an earlier controller left."""
    return {
        "controller_pid": left.controller_pid,
        "controller_alive": left.controller_alive,
        "arenas": left.arenas,
        "promoted": left.sites,
        "baseline": left.baseline,
        "foreign": left.foreign,
        "sites": [{"address": hex(addr), "state": state} for addr, state in left.site_addresses],
        "settings": list(left.settings),
    }


def _check_object(check: Check) -> JsonObject:
    """One check of a diagnosis."""
    return {
        "name": check.name,
        "status": check.status.value,
        "sentence": check.sentence,
        "advice": check.advice,
    }
