# SPDX-License-Identifier: Apache-2.0
"""Frozen control groups of both versions, in made-up trees."""

from __future__ import annotations

from pathlib import Path

import pytest

from optpoline.process.freezer import find_frozen_group

OTHER_MOUNTS = "25 1 0:1 / / rw - tmpfs tmpfs rw\n26 25 0:2 / /x rw - cgroup cgroup rw,cpu\n"


@pytest.mark.parametrize(
    ("line", "mount", "name", "content", "thawed"),
    [
        ("0::/a/b", "/ {} rw - cgroup2 c rw", "cgroup.events", "populated 1\nfrozen 1", "frozen 0"),
        ("0::/a/b", "/a {} rw shared:9 - cgroup2 c rw", "cgroup.events", "frozen 1", "frozen 0"),
        ("7:freezer:/a/b", "/ {} rw - cgroup c rw,freezer", "freezer.state", "FROZEN", "THAWED"),
        ("7:freezer:/a/b", "/ {} rw - cgroup c rw,freezer", "freezer.state", "FREEZING", "THAWED"),
    ],
)
def test_found(tmp_path: Path, line: str, mount: str, name: str, content: str, thawed: str) -> None:
    groups, proc_dir = tmp_path / "groups", tmp_path / "5"
    group = groups / ("b" if mount.startswith("/a ") else "a/b")
    for directory in (group, proc_dir, tmp_path / "self"):
        directory.mkdir(parents=True)
    mounts = f"{OTHER_MOUNTS}30 25 0:26 {mount.format(groups)}\n"
    (tmp_path / "self" / "mountinfo").write_text(mounts)
    (proc_dir / "cgroup").write_text(f"3:cpu:/\n{line}\n")
    assert find_frozen_group(proc_dir, tmp_path) is None
    (group / name).write_text(content + "\n")
    assert find_frozen_group(proc_dir, tmp_path) == "/a/b"
    (group / name).write_text(thawed + "\n")
    assert find_frozen_group(proc_dir, tmp_path) is None


def test_nothing_is_known(tmp_path: Path) -> None:
    assert find_frozen_group(tmp_path / "5", tmp_path) is None
    (tmp_path / "5").mkdir()
    (tmp_path / "5" / "cgroup").write_text("0::/a\n7:freezer:/a\n")
    assert find_frozen_group(tmp_path / "5", tmp_path) is None
