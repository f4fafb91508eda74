# SPDX-License-Identifier: Apache-2.0
"""Children that keep promotions are named, and how to undo that."""

from __future__ import annotations

from optpoline.controller.kept import MAX_NAMED, describe_kept
from optpoline.controller.summary import ChildSummary


def test_nothing_kept_is_nothing_to_tell() -> None:
    assert describe_kept(()) == ()
    assert describe_kept([ChildSummary(pid=7, kept=0, restored=4)]) == ()


def test_one() -> None:
    (note,) = describe_kept([ChildSummary(pid=7, kept=4), ChildSummary(pid=8, kept=0)])
    assert note == "child process 7 keeps 4 promoted sites: `optpoline detach 7` undoes that"


def test_many() -> None:
    children = [ChildSummary(pid=pid, kept=1) for pid in range(1, MAX_NAMED + 4)]
    (note,) = describe_kept(children)
    assert note.startswith(f"{len(children)} child processes keep promoted sites (1, 2, 3, 4, 5, ")
    assert "8 and 3 more): `optpoline detach CHILD` undoes that in each" in note


def test_those_that_cannot_be_read() -> None:
    notes = describe_kept([ChildSummary(pid=7, kept=None), ChildSummary(pid=9, kept=2)])
    assert len(notes) == 2
    assert "child process 9 keeps 2" in notes[0]
    assert "cannot be read of 7: `optpoline detach CHILD`, run as root" in notes[1]
