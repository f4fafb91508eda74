# SPDX-License-Identifier: Apache-2.0
"""An audit in words and as a document."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from optpoline.cli.main import main
from optpoline.controller.audit_report import (
    AuditReport,
    Fault,
    FaultKind,
    ForeignChange,
    ForeignKind,
)
from optpoline.report.audit_text import MAX_SHOWN, format_audit
from optpoline.report.json_document import audit_document
from optpoline.report.table import Style
from tests.unit.cli.fakes import FakeApi

SOUND = AuditReport(
    pid=4711,
    arenas=1,
    controller_pid=99,
    controller_alive=False,
    promoted=2,
    baseline=1,
    gone=0,
    blocks=3,
    retired=1,
    modules=4,
    faults=(),
    foreign_changes=(),
    notes=("a note\x1b",),
)
FAULT = Fault(kind=FaultKind.FREE_MEMORY, address=0x1000, sentence="free code memory " + "x " * 60)
CHANGE = ForeignChange(kind=ForeignKind.INT3, address=0x2000, size=1, module="/lib/l\n.so")
BROKEN = replace(SOUND, gone=1, faults=(FAULT,), foreign_changes=(CHANGE,))


def test_sound() -> None:
    assert format_audit(SOUND, Style(), with_all=False) == [
        "process 4711: all is well",
        "  2 sites promoted or learning, 1 at baseline; controller 99 (gone)",
        "  3 live blocks and 1 retired in 1 arena",
        "  text of 4 modules compared with its file",
        "note: a note?",
    ]


def test_nothing_there() -> None:
    lines = format_audit(replace(SOUND, arenas=0, notes=()), Style(), with_all=False)
    assert lines[0] == "process 4711: nothing of optpoline is in it"
    assert len(lines) == 2


def test_faults_and_foreign_changes() -> None:
    lines = format_audit(BROKEN, Style(width=60), with_all=False)
    assert lines[0] == "process 4711: 1 fault found"
    assert lines[1].startswith("  2 sites promoted or learning, 1 at baseline, 1 of modules")
    assert lines[4].startswith("  free_memory: free code memory x")
    assert "1 foreign change, not of optpoline's making" in lines
    assert "  0x2000, 1 byte in /lib/l?.so: int3: a breakpoint or a uprobe" in lines
    assert max(len(line) for line in lines[4:6]) <= 60
    assert any("\x1b[" in line for line in format_audit(BROKEN, Style(colour=True), with_all=True))


def test_many() -> None:
    report = replace(BROKEN, faults=(FAULT,) * 50, foreign_changes=(CHANGE,) * 30)
    lines = format_audit(report, Style(width=200), with_all=False)
    assert len([line for line in lines if "free_memory" in line]) == MAX_SHOWN
    assert "  and 30 more (-v)" in lines
    assert "  and 10 more (-v)" in lines
    lines = format_audit(report, Style(width=200), with_all=True)
    assert len([line for line in lines if "free_memory" in line]) == 50


def test_document() -> None:
    document = audit_document(BROKEN)
    assert document["sound"] is False
    assert document["faults"] == [
        {"kind": "free_memory", "address": "0x1000", "sentence": FAULT.sentence}
    ]
    manual = (Path(__file__).parents[3] / "docs" / "json.md").read_text()
    documented = set(re.findall(r"`([a-z_]+)`", manual))
    assert {*document, "kind", "address", "sentence", "size", "module"} <= documented
    for kind in (*FaultKind, *ForeignKind):
        assert f'`"{kind.value}"`' in manual


@pytest.mark.parametrize(("report", "status"), [(SOUND, 0), (BROKEN, 7)])
def test_exit_status(report: AuditReport, status: int, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", "4711"], api=FakeApi(report=report)) == status
    assert capsys.readouterr().out.startswith("process 4711: ")
    assert main(["check", "4711", "--json", "-"], api=FakeApi(report=report)) == status
    assert '"command": "check"' in capsys.readouterr().out


def test_foreign_changes_alone_are_no_failure() -> None:
    report = replace(SOUND, foreign_changes=(CHANGE,))
    assert main(["check", "4711", "-q"], api=FakeApi(report=report)) == 0
