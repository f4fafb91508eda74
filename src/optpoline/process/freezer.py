# SPDX-License-Identifier: Apache-2.0
"""Say whether a process is frozen by its control group.

A frozen thread looks asleep, but runs nothing, not even a system call of ours,
until it is thawed (Documentation/admin-guide/cgroup-v2.rst: cgroup.events;
cgroup-v1/freezer-subsystem.rst: freezer.state). Both say the effective state:
groups above count.
"""

from __future__ import annotations

from pathlib import Path

__all__ = ["find_frozen_group"]


def find_frozen_group(proc_dir: Path, proc_root: Path) -> str | None:
    """Return the path of the frozen control group that a process is in, or None.

    None as well where it cannot be told: no group is mounted, or not for us.

    Args:
        proc_dir: The directory in ``/proc`` that shows the process.
        proc_root: Where procfs is mounted.
    """
    mounts = _read(proc_root / "self" / "mountinfo").splitlines()
    for line in _read(proc_dir / "cgroup").splitlines():
        number, controllers, path = line.split(":", 2)
        if number == "0":
            directory = _find_directory(mounts, "cgroup2", "", path)
            if directory and "frozen 1" in _read(directory / "cgroup.events").splitlines():
                return path
        elif "freezer" in controllers.split(","):
            directory = _find_directory(mounts, "cgroup", "freezer", path)
            if directory and _read(directory / "freezer.state").strip() not in {"", "THAWED"}:
                return path
    return None


def _find_directory(mounts: list[str], kind: str, option: str, path: str) -> Path | None:
    """Return where a group is mounted, or None.

    Args:
        mounts: Lines of mountinfo: id, parent, device, root, mount point ... - kind,
            source, options of the file system.
        kind: File system.
        option: One that it must have, or "".
        path: The group.
    """
    for line in mounts:
        before, _, after = line.partition(" - ")
        _, _, _, root, mount_point, *_ = before.split()
        found, _, options = after.split(maxsplit=2)
        root = root.rstrip("/")
        is_below = path == root or path.startswith(f"{root}/")
        if found == kind and is_below and (not option or option in options.split(",")):
            return Path(mount_point) / path[len(root) :].lstrip("/")
    return None


def _read(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
