# SPDX-License-Identifier: Apache-2.0
"""Who asks about whom: what ``/proc`` says of ourselves and a target, read once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from optpoline.errors import OptpolineError, ProcessGone
from optpoline.process.leader import find_live_tid
from optpoline.process.procfs import RUNS_NO_CODE, list_tids, read_state_char

__all__ = [
    "CAP_DAC_OVERRIDE",
    "CAP_SYS_ADMIN",
    "CAP_SYS_PTRACE",
    "Scene",
    "StatusFields",
    "read_scene",
    "read_status_fields",
]

# include/uapi/linux/capability.h
CAP_DAC_OVERRIDE = 1
CAP_SYS_PTRACE = 19
CAP_SYS_ADMIN = 21


@dataclass(frozen=True, slots=True)
class StatusFields:
    """The fields of one ``/proc/PID/status``."""

    fields: Mapping[str, str]

    @property
    def is_dead(self) -> bool:
        """Whether it has exited."""
        return self.fields.get("State", "")[:1] in {"Z", "X", "x"}

    def number(self, name: str, default: int = 0) -> int:
        """First decimal number of a field."""
        words = self.fields.get(name, "").split()
        return int(words[0]) if words else default

    def ids(self, name: str) -> tuple[int, int, int]:
        """Real, effective and saved id of the ``Uid`` or ``Gid`` field."""
        words = [int(word) for word in self.fields.get(name, "").split()] + [-1, -1, -1]
        return words[0], words[1], words[2]

    def capabilities(self, name: str) -> int:
        """A capability set as a bit mask."""
        return int(self.fields.get(name, "0") or "0", 16)

    def has_cap(self, cap: int) -> bool:
        """Whether a capability is in the effective set."""
        return bool(self.capabilities("CapEff") >> cap & 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scene:
    """Who asks about whom, as read once.

    Attributes:
        pid: The target.
        live_tid: A thread of it that has not exited; the first one if it lives.
        proc_root: Where procfs is mounted.
        sys_root: Where the sysctl tree is.
        ours: Our own status.
        theirs: The status of ``live_tid``.
        threads: The status of each of its threads that lives, kernel workers left out.
    """

    pid: int
    live_tid: int
    proc_root: Path
    sys_root: Path
    ours: StatusFields
    theirs: StatusFields
    threads: tuple[StatusFields, ...]

    @property
    def proc_dir(self) -> Path:
        """The directory in ``/proc`` that shows the target."""
        return self.proc_root / str(self.live_tid)

    @property
    def name(self) -> str:
        """The target as sentences call it."""
        comm = self.theirs.fields.get("Name", "")
        return f"process {self.pid} ({comm})" if comm else f"process {self.pid}"

    @property
    def may_override(self) -> bool:
        """Whether we hold CAP_SYS_PTRACE."""
        return self.ours.has_cap(CAP_SYS_PTRACE)

    @property
    def how_to_override(self) -> str:
        """Advice that gets CAP_SYS_PTRACE."""
        if self.ours.ids("Uid")[1] == 0:
            return (
                "we are root without CAP_SYS_PTRACE: start the container with --cap-add SYS_PTRACE"
            )
        return "run optpoline as root (sudo) or with CAP_SYS_PTRACE"


def read_scene(pid: int, proc_root: Path, sys_root: Path) -> Scene | None:
    """Read what the rules need; None if there is no such process.

    Raises:
        PermissionError: if procfs hides it (hidepid).
    """
    theirs = read_status_fields(proc_root / str(pid))
    if theirs is None:
        return None
    live_tid = pid
    if theirs.is_dead:
        live_tid = find_live_tid(pid, proc_root=proc_root)
        theirs = read_status_fields(proc_root / str(live_tid)) or theirs
    return Scene(
        pid=pid,
        live_tid=live_tid,
        proc_root=proc_root,
        sys_root=sys_root,
        ours=read_status_fields(proc_root / "self") or StatusFields({}),
        theirs=theirs,
        threads=_read_threads(pid, proc_root) or (theirs,),
    )


def read_status_fields(proc_dir: Path) -> StatusFields | None:
    """Read one ``status`` file; None if there is no such process.

    Raises:
        PermissionError: if procfs hides it (hidepid).
    """
    try:
        text = (proc_dir / "status").read_text(errors="replace")
    except (FileNotFoundError, ProcessLookupError, NotADirectoryError):
        return None
    pairs = (line.partition(":") for line in text.splitlines())
    return StatusFields({name: value.strip() for name, _, value in pairs})


def _read_threads(pid: int, proc_root: Path) -> tuple[StatusFields, ...]:
    """Read the status of each live thread; none if that cannot be had."""
    try:
        tids = list_tids(pid, proc_root=proc_root)
        found = [_read_thread(pid, tid, proc_root) for tid in tids]
    except (OptpolineError, OSError):
        return ()
    return tuple(status for status in found if status is not None)


def _read_thread(pid: int, tid: int, proc_root: Path) -> StatusFields | None:
    """Read the status of a thread; None if it runs no code of the program."""
    try:
        if read_state_char(pid, tid, proc_root=proc_root) in RUNS_NO_CODE:
            return None
    except ProcessGone:
        return None
    return read_status_fields(proc_root / str(pid) / "task" / str(tid))
