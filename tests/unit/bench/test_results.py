# SPDX-License-Identifier: Apache-2.0
"""The file of results keeps the groups that were not measured again."""

from __future__ import annotations

import json
from pathlib import Path

from bench.build import Variant
from bench.figures import Figure
from bench.results import SCHEMA_VERSION, figures_document, group_document, write_group
from bench.workload import PROMOTED, Measured


def lua_row() -> Measured:
    samples = {
        Variant.PLAIN.value: (100,) * 5,
        Variant.RETPOLINE.value: (300,) * 5,
        PROMOTED: (102,) * 5,
    }
    return Measured(group="lua", name="sort", samples=samples)


def test_a_group_replaces_only_itself(tmp_path: Path) -> None:
    path = tmp_path / "build" / "bench.json"
    write_group(path, "lua", group_document("lua", [lua_row()]))
    figure = Figure(name="longest stop", value=3.0, unit="ms", bar=2.0)
    write_group(path, "figures", figures_document([figure]))
    written = json.loads(path.read_text())
    assert written["schema_version"] == SCHEMA_VERSION
    assert set(written["groups"]) == {"lua", "figures"}
    assert written["groups"]["lua"]["verdict"] == "met"
    workload = written["groups"]["lua"]["workloads"][0]
    assert workload["recovered"]["value"] == 0.99
    assert workload["medians"]["plain"] == {"value": 100.0, "low": 100.0, "high": 100.0}
    assert written["groups"]["figures"]["figures"][0]["verdict"] == "MISSED"


def test_results_of_another_schema_are_not_mixed_in(tmp_path: Path) -> None:
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"schema_version": 0, "groups": {"old": {}}}))
    write_group(path, "lua", group_document("lua", [lua_row()]))
    assert set(json.loads(path.read_text())["groups"]) == {"lua"}
