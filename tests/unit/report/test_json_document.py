# SPDX-License-Identifier: Apache-2.0
"""Documents are what docs/json.md says they are."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import pytest

from optpoline.controller.summary import (
    BranchSource,
    ChildSummary,
    DeclaredKind,
    DeclaredSummary,
    DetachOutcome,
    DetachResult,
    LeftBehind,
    ReclaimSummary,
    Summary,
)
from optpoline.errors import OptpolineError
from optpoline.process.checks import Check, CheckStatus
from optpoline.report.flags_document import directories_document, flags_document, plugin_document
from optpoline.report.json_document import (
    JsonObject,
    JsonValue,
    checks_document,
    detach_document,
    encode_document,
    error_document,
    keys_document,
    session_document,
    sites_document,
    static_calls_document,
    status_document,
)
from optpoline.toolchain.compiler import Compiler, Family
from tests.unit.cli.declared_summaries import CODEC, TRACE
from tests.unit.cli.fakes import make_site, make_summary

RESULT = DetachResult(
    outcome=DetachOutcome.CLEAN,
    restored=1,
    foreign=(0x10,),
    notes=("n",),
    children=(ChildSummary(pid=3, kept=2), ChildSummary(pid=4, kept=None, restored=1)),
)
LEFT = LeftBehind(
    pid=1,
    controller_pid=2,
    controller_alive=True,
    arenas=1,
    sites=1,
    baseline=0,
    foreign=0,
    site_addresses=((0x10, "patched"),),
)
GCC = Compiler(command=("gcc",), family=Family.GCC, version="12.2.0")
CHECK = Check(name="kind", status=CheckStatus.OK, sentence="fine")
SUMMARY = make_summary()

DECLARED = DeclaredSummary(
    module="/m",
    address=0x401000,
    offset=0x1000,
    kind=DeclaredKind.BRANCH,
    name="trace",
    type=None,
    function="f+0x3",
    file="a.c",
    line=7,
    size=6,
    begins_on=False,
)

DOCUMENTS: dict[str, JsonObject] = {
    "key": keys_document(1, (TRACE,)),
    "static-call": static_calls_document(1, (CODEC,)),
    "session": session_document(SUMMARY, RESULT, command="attach"),
    "sites": sites_document("1", SUMMARY.modules, SUMMARY.sites, ("n",), (DECLARED,)),
    "status": status_document(1, LEFT),
    "detach": detach_document(1, RESULT),
    "doctor": checks_document(1, (CHECK,), (CHECK,), 0),
    "cflags": flags_document("cflags", GCC, ("-O2",)),
    "directories": directories_document((Path("/x"),)),
    "plugin": plugin_document(GCC, Path("/x/optpoline.so")),
    "error": error_document(OptpolineError("m", hint="h"), 1),
}


def field_names(value: JsonValue) -> Iterator[str]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield name
            yield from field_names(inner)
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for inner in value:
            yield from field_names(inner)


@pytest.mark.parametrize("name", DOCUMENTS)
def test_documents_begin_with_their_version(name: str) -> None:
    text = encode_document(DOCUMENTS[name])
    assert text.startswith('{\n  "schema_version": 1,')
    assert text.endswith("}\n")
    assert json.loads(text) == json.loads(json.dumps(DOCUMENTS[name]))


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_field_is_documented(name: str) -> None:
    manual = (Path(__file__).parents[3] / "docs" / "json.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", manual))
    assert set(field_names(DOCUMENTS[name])) <= documented


def test_what_was_promised_is_there() -> None:
    promised = {"state", "sites", "promoted", "hit_rate", "stops", "stop_ms_max"} | {
        "stop_ms_total",
        "learning_s",
        "schema_version",
    }
    document = DOCUMENTS["session"]
    assert promised <= set(document)
    sites = document["sites"]
    assert isinstance(sites, Sequence)
    site = sites[0]
    assert isinstance(site, Mapping)
    assert {"module", "address", "function", "kind", "targets"} <= set(site)


def shown_sites(summary: Summary) -> list[Mapping[str, object]]:
    """Return the sites of a session's document."""
    sites = session_document(summary, None, command="attach")["sites"]
    assert isinstance(sites, Sequence)
    assert all(isinstance(site, Mapping) for site in sites)
    return [site for site in sites if isinstance(site, Mapping)]


def test_whose_branches_a_site_has() -> None:
    site = replace(make_site(), table="handlers", max_branches=2, source=BranchSource.TABLE)
    (shown,) = shown_sites(replace(make_summary(), sites=(site,)))
    told = {"table": "handlers", "max_branches": 2, "branches_from": "table"}
    assert {key: shown[key] for key in told} == told
    assert [site["branches_from"] for site in shown_sites(make_summary())] == [None, None]


def test_declarations_field_by_field() -> None:
    assert DOCUMENTS["sites"]["declared"] == [
        {
            "module": "/m",
            "address": "0x401000",
            "offset": "0x1000",
            "kind": "branch",
            "name": "trace",
            "type": None,
            "function": "f+0x3",
            "file": "a.c",
            "line": 7,
            "size": 6,
            "begins_on": False,
            "problem": None,
        }
    ]


def test_reclaiming_is_told() -> None:
    reclaim = ReclaimSummary(
        blocks_retired=6,
        blocks_reclaimed=5,
        blocks_reused=4,
        grace_periods=3,
        bytes_poisoned=2,
        holders=(1, 7),
        is_search_refused=True,
    )
    document = session_document(replace(SUMMARY, reclaim=reclaim), None, command="attach")
    assert document["reclaim"] == {
        "blocks_retired": 6,
        "blocks_reclaimed": 5,
        "blocks_reused": 4,
        "grace_periods": 3,
        "bytes_poisoned": 2,
        "holders": [1, 7],
        "search_refused": True,
    }


def test_children_are_told() -> None:
    detach = DOCUMENTS["detach"]["detach"]
    assert isinstance(detach, Mapping)
    assert detach["children"] == [
        {"pid": 3, "kept": 2, "restored": 0},
        {"pid": 4, "kept": None, "restored": 1},
    ]


def test_long_stops_are_told() -> None:
    summary = replace(SUMMARY, stop_ms_limit=5.0, stops_over_limit=2)
    document = session_document(summary, None, command="attach")
    assert (document["stop_ms_limit"], document["stops_over_limit"]) == (5.0, 2)
    assert DOCUMENTS["session"]["stop_ms_limit"] is None


def test_numbers_json_does_not_have_are_refused() -> None:
    document = session_document(replace(SUMMARY, hit_rate=math.nan), None, command="run")
    with pytest.raises(ValueError, match="JSON"):
        encode_document(document)


def test_absent_results_are_null() -> None:
    assert status_document(1, None)["left_behind"] is None
    assert detach_document(1, None)["detach"] is None
    assert session_document(SUMMARY, None, command="run", exit_status=3)["exit_status"] == 3
