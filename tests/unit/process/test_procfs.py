# SPDX-License-Identifier: Apache-2.0
"""Readers of /proc against a tree of files, oddities included."""

from __future__ import annotations

import os
from itertools import pairwise
from pathlib import Path

import pytest

from optpoline.errors import ProcessGone
from optpoline.process.procfs import (
    RUNS_NO_CODE,
    list_every_tid,
    list_tids,
    read_exe_path,
    read_maps,
    read_maps_around,
    read_seccomp_mode,
    read_start_time,
    read_state_char,
    read_status,
)
from optpoline.process.thread_state import (
    ThreadWhere,
    has_slept_since,
    read_asleep,
    read_thread_state,
)

PID, TID = 1234, 1235
STATUS = """Name:\todd) (na\\012me
State:\tS (sleeping)
Tgid:\t1234
Pid:\t1234
PPid:\t1
TracerPid:\t77
Uid:\t1000\t1001\t1002\t1003
Gid:\t100\t101\t102\t103
NSpid:\t1234\t5
Threads:\t2
CapEff:\t0000000000000400
Seccomp:\t2
Kthread:\t0
voluntary_ctxt_switches:\t42
nonvoluntary_ctxt_switches:\t7
"""
STAT = f"{PID} (odd) (name) S 1 {PID} {PID} 0 -1 4194304 " + " ".join(map(str, range(100, 143)))
MAPS = """\
555555554000-555555556000 r--p 00000000 fd:01 1234                       /usr/bin/a b
555555556000-555555559000 r-xp 00002000 fd:01 1234                       /usr/bin/a b
7ffff7fc0000-7ffff7fc1000 rw-p 00000000 00:00 0
7ffff7fc1000-7ffff7fc2000 r-xp 00000000 00:01 99                         /memfd:x (deleted)
7ffff7fc2000-7ffff7fc4000 r-xp 00000000 00:00 0                          [vdso]
7ffff7fd0000-7ffff7fd1000 r--s 00000000 fd:01 5                          /tmp/new\\012line
ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                  [vsyscall]
"""


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Return a /proc with one process of two threads."""
    process = tmp_path / str(PID)
    for tid in (PID, TID):
        task = process / "task" / str(tid)
        task.mkdir(parents=True)
        (task / "status").write_text(STATUS.replace("Pid:\t1234\nPP", f"Pid:\t{tid}\nPP"))
        (task / "stat").write_text(STAT)
        (task / "syscall").write_text(
            "202 0x1 0x80 0x0 0x0 0x0 0xffffffffffffffff 0x7ffe10 0x401000\n"
        )
    (process / "status").write_text(STATUS)
    (process / "stat").write_text(STAT)
    (process / "maps").write_text(MAPS)
    (process / "exe").symlink_to("/usr/bin/a b (deleted)")
    return tmp_path


def test_maps(proc: Path) -> None:
    maps = read_maps(PID, proc_root=proc)
    assert [m.path for m in maps] == [
        "/usr/bin/a b", "/usr/bin/a b", "", "/memfd:x (deleted)", "[vdso]", "/tmp/new\nline",
        "[vsyscall]",
    ]  # fmt: skip
    text = maps[1]
    assert (text.start, text.end, text.offset) == (0x555555556000, 0x555555559000, 0x2000)
    assert (text.perms, text.device, text.inode) == ("r-xp", "fd:01", 1234)
    assert text.is_executable
    assert maps[2].is_writable


def test_maps_of_a_zombie(proc: Path) -> None:
    (proc / str(PID) / "maps").write_text("")
    with pytest.raises(ProcessGone):
        read_maps(PID, proc_root=proc)


def test_maps_of_one_whose_first_thread_has_exited(proc: Path) -> None:
    """Any thread shows them, but for one that the kernel has made for itself."""
    (proc / str(PID) / "maps").write_text("")
    task = proc / str(PID) / "task" / str(TID)
    (task / "maps").write_text(MAPS)
    assert len(read_maps(PID, proc_root=proc)) == 7
    (task / "stat").write_text(
        STAT.replace(" 4194304 ", " 16 ").replace(" 122 ", f" {0x7FFBFEFF} ")
    )
    with pytest.raises(ProcessGone):
        read_maps(PID, proc_root=proc)


def test_threads(proc: Path) -> None:
    assert list_tids(PID, proc_root=proc) == (PID, TID)


def test_stat(proc: Path) -> None:
    # Field 22; fields 10 to 52 are 100 to 142 here.
    assert read_start_time(PID, proc_root=proc) == 112
    assert read_state_char(PID, TID, proc_root=proc) == "S"


def test_status(proc: Path) -> None:
    status = read_status(PID, proc_root=proc)
    assert (status.pid, status.name, status.state) == (PID, "odd) (na\nme", "S")
    assert (status.tgid, status.ppid, status.tracer_pid) == (1234, 1, 77)
    assert status.uids == (1000, 1001, 1002, 1003)
    assert status.gids == (100, 101, 102, 103)
    assert (status.ns_pids, status.n_threads, status.seccomp) == ((1234, 5), 2, 2)
    assert status.cap_eff == 0x400
    assert not status.is_kernel_thread
    assert read_status(PID, tid=TID, proc_root=proc).pid == TID


def test_seccomp_is_each_threads_own(proc: Path) -> None:
    other = proc / str(PID) / "task" / str(TID) / "status"
    other.write_text(STATUS.replace("Seccomp:\t2\n", "Seccomp:\t0\nSeccomp_filters:\t3\n"))
    assert read_seccomp_mode(PID, PID, proc_root=proc) == 2
    assert read_seccomp_mode(PID, TID, proc_root=proc) == 0
    # A kernel without seccomp.
    other.write_text(STATUS.replace("Seccomp:\t2\n", ""))
    assert read_seccomp_mode(PID, TID, proc_root=proc) == 0


def test_kernel_thread_of_an_older_kernel(proc: Path) -> None:
    path = proc / str(PID)
    (path / "status").write_text(STATUS.replace("Kthread:\t0\n", ""))
    assert not read_status(PID, proc_root=proc).is_kernel_thread
    (path / "stat").write_text(STAT.replace(" 4194304 ", " 2129984 "))
    assert read_status(PID, proc_root=proc).is_kernel_thread


@pytest.mark.parametrize(
    ("text", "where", "nr", "sp", "pc"),
    [
        ("running\n", ThreadWhere.RUNNING, -1, 0, 0),
        ("-1 0x7ffe10 0x401000\n", ThreadWhere.BLOCKED, -1, 0x7FFE10, 0x401000),
        ("0 0x3 0x1 0x1 0x0 0x0 0x9 0x7e10 0x400f\n", ThreadWhere.IN_SYSCALL, 0, 0x7E10, 0x400F),
    ],
)  # fmt: skip
def test_thread_state(proc: Path, text: str, where: ThreadWhere, nr: int, sp: int, pc: int) -> None:
    (proc / str(PID) / "task" / str(TID) / "syscall").write_text(text)
    state = read_thread_state(PID, TID, proc_root=proc)
    assert (state.where, state.syscall_nr, state.sp, state.pc) == (where, nr, sp, pc)
    assert len(state.syscall_args) == (6 if nr >= 0 else 0)
    assert (state.tid, state.state) == (TID, "S")
    assert (state.n_voluntary, state.n_nonvoluntary) == (42, 7)
    assert state.tracer_pid == 77


@pytest.mark.parametrize(
    ("flag", "blocked", "expected"),
    [
        (0x10, 0x7FFBFEFF, "k"),
        (0x4000, 0x7FFBFEFF, "k"),
        (0x4010, 0x7FFBFEFF, "k"),
        (0, 0x7FFBFEFF, "S"),  # who blocks all signals is no worker for that
        (0x10, 0x7FFBFEFE, "S"),  # before Linux 5.10 the flag of who runs a virtual machine
        (0x4000, 0, "S"),  # before Linux 5.17 that of who has loaded a module
    ],
)
def test_kernel_worker(proc: Path, flag: int, blocked: int, expected: str) -> None:
    stat = STAT.replace(" 4194304 ", f" {4194304 | flag} ").replace(" 122 ", f" {blocked} ")
    (proc / str(PID) / "task" / str(TID) / "stat").write_text(stat)
    assert read_state_char(PID, TID, proc_root=proc) == expected
    assert (expected in RUNS_NO_CODE) == (expected == "k")


CALL = "202 0x1 0x80 0x0 0x0 0x0 0xffffffffffffffff 0x7ffe10 0x401000\n"


@pytest.mark.parametrize(
    ("syscall", "old", "new", "expected"),
    [
        (CALL, "", "", True),
        ("running\n", "", "", False),  # it woke, and has left its CPU for nothing yet
        ("", "", "", False),
        (CALL.replace("0x7ffe10", "0x7ffe18"), "", "", False),
        (CALL.replace("0x401000", "0x401002"), "", "", False),
        (CALL.replace("202 ", "203 "), "", "", False),
        ("-1 0x7ffe10 0x401000\n", "", "", False),
        (CALL, ":\t42", ":\t43", False),
        (CALL, ":\t7\n", ":\t8\n", False),
    ],
)  # fmt: skip
def test_sleep(proc: Path, syscall: str, old: str, new: str, expected: bool) -> None:
    before = read_thread_state(PID, TID, proc_root=proc)
    task = proc / str(PID) / "task" / str(TID)
    (task / "syscall").write_text(syscall)
    (task / "status").write_text((task / "status").read_text().replace(old, new))
    assert has_slept_since(PID, before, proc_root=proc) is expected


def test_asleep(proc: Path) -> None:
    task = proc / str(PID) / "task" / str(TID)
    before = read_asleep(PID, TID, proc_root=proc)
    assert before == read_thread_state(PID, TID, proc_root=proc)
    assert before is not None
    (task / "syscall").write_text("running\n")
    assert read_asleep(PID, TID, proc_root=proc) is None
    for path in task.iterdir():
        path.unlink()
    assert read_asleep(PID, TID, proc_root=proc) is None
    assert not has_slept_since(PID, before, proc_root=proc)


def test_counters_are_read_after_the_place(proc: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It may run between the two, and sleep again where it was."""
    before = read_thread_state(PID, TID, proc_root=proc)
    task = proc / str(PID) / "task" / str(TID)
    open_file = os.open

    def open_and_go_on(path: str, flags: int) -> int:
        fd = open_file(path, flags)
        if path.endswith("/syscall"):
            status = (task / "status").read_text().replace(":\t42", ":\t43")
            (task / "status").write_text(status)
        return fd

    monkeypatch.setattr(os, "open", open_and_go_on)
    assert not has_slept_since(PID, before, proc_root=proc)


def list_in_turn(monkeypatch: pytest.MonkeyPatch, *listings: list[int]) -> list[list[int]]:
    """Let the kernel list these threads, one listing after another; return what is left."""
    left = list(listings)
    monkeypatch.setattr(os, "listdir", lambda _: list(map(str, left.pop(0))))
    return left


def set_n_threads(proc: Path, n_threads: int) -> None:
    """Let the process have so many threads."""
    (proc / str(PID) / "status").write_text(STATUS.replace("Threads:\t2", f"Threads:\t{n_threads}"))


def test_listing_that_ended_early_is_made_again(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_n_threads(proc, 3)
    left = list_in_turn(monkeypatch, [1, 2], [1, 3], [1, 3, 4], [1, 3, 4, 5])
    assert list_every_tid(PID, proc_root=proc) == (1, 3, 4, 5)
    assert left == []


def test_listing_with_one_that_exits_is_made_again(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As many as there are, but thread 2 has exited and thread 3 is missing.
    left = list_in_turn(monkeypatch, [1, 2], [1, 3], [1, 3])
    assert list_every_tid(PID, proc_root=proc) == (1, 3)
    assert left == []


def test_listings_that_never_agree_are_put_together(
    proc: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    set_n_threads(proc, 100)
    list_in_turn(monkeypatch, *([1, n] for n in range(2, 30)))
    assert list_every_tid(PID, proc_root=proc)[:9] == (1, 2, 3, 4, 5, 6, 7, 8, 9)


def test_exe(proc: Path) -> None:
    assert read_exe_path(PID, proc_root=proc) == "/usr/bin/a b"


@pytest.mark.parametrize(
    "read", [read_maps, list_tids, read_start_time, read_status, read_exe_path]
)
def test_gone(read: object, tmp_path: Path) -> None:
    assert callable(read)
    with pytest.raises(ProcessGone):
        read(PID, proc_root=tmp_path)


def test_own_process() -> None:
    pid = os.getpid()
    assert any(m.path == "[vdso]" for m in read_maps(pid))
    assert pid in list_tids(pid)
    assert read_start_time(pid) > 0
    assert read_status(pid).tgid == pid
    # We are in read(2), of that very file.
    assert read_thread_state(pid, pid).syscall_nr == 0


def test_maps_around_an_address_are_two_lines_of_all(proc: Path) -> None:
    maps = read_maps(PID, proc_root=proc)
    for below, at in pairwise(maps):
        for addr in (at.start, at.start + 1, at.end):
            if addr > below.end:
                assert read_maps_around(PID, addr, proc_root=proc) == (below, at)
    assert read_maps_around(PID, 0, proc_root=proc) == maps[:1]
    assert read_maps_around(PID, 1 << 64, proc_root=proc) == maps[-1:]
