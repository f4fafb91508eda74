# SPDX-License-Identifier: Apache-2.0
"""Which runnable threads are stopped, and which are left in the middle of a transfer."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest

from optpoline.errors import ProcessGone
from optpoline.process import busy
from optpoline.process.thread_state import read_kernel_stack


def _call_stack(*names: str) -> str:
    functions = (*names, "do_syscall_64", "entry_SYSCALL_64_after_hwframe")
    return "".join(f"[<0>] {name}+0x71/0x280\n" for name in functions)


TRANSFER = _call_stack("pipe_write", "vfs_write", "ksys_write")
CALL = _call_stack("do_sys_poll", "__x64_sys_poll")
USER = "[<0>] irqentry_exit_to_user_mode+0x110/0x1a0\n[<0>] asm_sysvec_apic_timer+0x16/0x20\n"
ON_CPU = ""

Looks = list[tuple[str, str]]


def test_kernel_stack(tmp_path: Path) -> None:
    task = tmp_path / "7" / "task" / "8"
    task.mkdir(parents=True)
    (task / "stack").write_text(TRANSFER)
    assert read_kernel_stack(7, 8, proc_root=tmp_path) == TRANSFER
    with pytest.raises(ProcessGone):
        read_kernel_stack(7, 9, proc_root=tmp_path)


@pytest.fixture
def show(monkeypatch: pytest.MonkeyPatch) -> Callable[[Looks], None]:
    """Return a function that says what is seen of any thread, look by look; the last stays."""
    looks: Looks = []

    def state(_pid: int, tid: int) -> str:
        if looks[0][0] == "gone":
            raise ProcessGone(tid)
        return looks[0][0]

    def stack(_pid: int, _tid: int) -> str:
        return looks.pop(0)[1] if len(looks) > 1 else looks[0][1]

    monkeypatch.setattr(busy, "read_state_char", state)
    monkeypatch.setattr(busy, "_read_stack", stack)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    return looks.extend


@pytest.mark.parametrize(
    ("looks", "is_busy"),
    [
        ([("R", USER)], True),
        ([("R", CALL)], True),
        ([("R", TRANSFER)], False),
        ([("R", ON_CPU)], True),
        ([("R", ON_CPU), ("S", CALL)], False),
        ([("R", ON_CPU), ("R", TRANSFER)], False),
        ([("R", ON_CPU), ("R", ON_CPU), ("R", USER)], True),
        ([("S", CALL)], False),
        ([("gone", CALL)], False),
    ],
)
def test_looks(show: Callable[[Looks], None], looks: Looks, is_busy: bool) -> None:
    show(looks)
    assert (8 in busy.find_busy({8: 7})) is is_busy


def test_too_many_are_not_looked_at(show: Callable[[Looks], None]) -> None:
    show([("R", TRANSFER)])
    many = dict.fromkeys(range(busy.MAX_LOOKED_AT + 1), 7)
    assert busy.find_busy(many) == set(many)


@pytest.mark.parametrize(
    ("state", "stack", "expected"),
    [
        ("R", USER, False),
        ("R", CALL, False),
        ("S", CALL, True),
        ("R", TRANSFER, True),
        ("R", ON_CPU, False),
        ("S", ON_CPU, True),  # we may not look at its stack
    ],
)
def test_last_look(show: Callable[[Looks], None], state: str, stack: str, expected: bool) -> None:
    show([(state, stack)])
    assert busy.is_asleep_or_transferring(7, 8) is expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        ("ksys_write", True),
        ("do_writev", True),
        ("__x64_sys_recvfrom", True),
        ("__sys_sendmsg", True),
        ("do_sendfile", True),
        ("ksys_read", False),
        ("vfs_write", False),
        ("__x64_sys_writes", False),
    ],
)
def test_names_of_transfers(show: Callable[[Looks], None], function: str, expected: bool) -> None:
    show([("R", _call_stack(function))])
    assert busy.is_transferring(7, 8) is expected
