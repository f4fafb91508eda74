# SPDX-License-Identifier: Apache-2.0
"""Whether those who slept in a stop have slept all the while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import pytest

from optpoline.controller import exclusion as module
from optpoline.controller.address_space import AddressSpace
from optpoline.controller.exclusion import stopped
from optpoline.model import Mapping
from optpoline.process import thread_state
from optpoline.process.memory import RemoteMemory
from optpoline.process.stop import Stop, Wake

PID, TID = 1234, 1235
CALL = "202 0x1 0x80 0x0 0x0 0x0 0xffffffffffffffff 0x7ffe10 0x401000\n"


class OneSleeper(Stop):
    """A stop that has left one thread asleep."""

    def __init__(self) -> None:
        """Stop nobody."""

    @property
    def sleepers(self) -> tuple[tuple[int, int], ...]:
        """The thread."""
        return ((PID, TID),)


@contextmanager
def stop(_: Wake) -> Iterator[Stop]:
    """Leave one thread asleep."""
    yield OneSleeper()


def no_maps() -> Sequence[Mapping]:
    """Return no memory map."""
    return ()


@pytest.fixture
def show(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str, int], None]:
    """Return a function that makes the thread look so: its state, where it is, its switches."""
    task = tmp_path / str(PID) / "task" / str(TID)
    task.mkdir(parents=True)
    for name in ("read_asleep", "has_slept_since"):
        function = partial(getattr(thread_state, name), proc_root=tmp_path)
        monkeypatch.setattr(module, name, function, raising=False)

    def show_it(state: str, where: str, n_switches: int) -> None:
        (task / "syscall").write_text(where)
        (task / "status").write_text(
            f"State:\t{state}\nTracerPid:\t0\nvoluntary_ctxt_switches:\t{n_switches}\n"
            "nonvoluntary_ctxt_switches:\t0\n"
        )

    return show_it


@pytest.mark.parametrize(
    ("state", "where", "n_switches", "is_intact"),
    [
        ("S (sleeping)", CALL, 5, True),
        ("S (sleeping)", CALL, 6, False),
        ("R (running)", "running\n", 5, False),
        # It was awake, and calls itself asleep before it has left its CPU.
        ("S (sleeping)", "running\n", 5, False),
    ],
)
def test_who_slept(
    show: Callable[[str, str, int], None], state: str, where: str, n_switches: int, is_intact: bool
) -> None:
    space = AddressSpace(
        pid=PID, memory=RemoteMemory.__new__(RemoteMemory), read_maps=no_maps, stop=stop
    )
    show("S (sleeping)", CALL, 5)
    with stopped([space]) as exclusion:
        show(state, where, n_switches)
        assert exclusion.is_intact() is is_intact


def test_who_was_about_to_sleep(show: Callable[[str, str, int], None]) -> None:
    space = AddressSpace(
        pid=PID, memory=RemoteMemory.__new__(RemoteMemory), read_maps=no_maps, stop=stop
    )
    show("S (sleeping)", "running\n", 5)
    with stopped([space]) as exclusion:
        assert not exclusion.is_intact()
