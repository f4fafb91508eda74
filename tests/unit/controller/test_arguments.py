# SPDX-License-Identifier: Apache-2.0
"""What is no process id is told as that, by every function that wants one."""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

import numpy
import pytest

import optpoline
from optpoline.controller.arguments import CHANGES, Change, validate_pid, validate_setting

NO_PIDS = (-1, 0, None, 3.5, "x", "self", "4711", b"1", True)


@pytest.mark.parametrize("pid", NO_PIDS, ids=repr)
@pytest.mark.parametrize(
    "function", [optpoline.attach, optpoline.audit, optpoline.read_status, optpoline.restore]
)
def test_no_process_id(function: Callable[[object], object], pid: object) -> None:
    with pytest.raises(optpoline.UsageError) as caught:
        function(pid)
    assert caught.value.message == f"{pid!r} is not a process id"


@pytest.mark.parametrize("subject", [-1, 0, None, 3.5, b"/bin/true", True], ids=repr)
def test_neither_a_process_id_nor_a_path(subject: object) -> None:
    with pytest.raises(optpoline.UsageError):
        optpoline.find_sites(cast(int, subject))


def test_whole_numbers_are_process_ids() -> None:
    assert validate_pid(1) == 1
    assert validate_pid(1 << 40) == 1 << 40
    assert validate_pid(numpy.int64(4711)) == 4711


def test_any_number_from_0_up_is_a_setting() -> None:
    for value in (0, 0.5, 1e9, numpy.float32(3)):
        validate_setting("learn_s", value)


@pytest.mark.parametrize("value", ["swap ", "off", "", None, 1], ids=repr)
def test_no_way_to_change_sites(value: object) -> None:
    with pytest.raises(optpoline.UsageError, match=r"change is .*, not 'swap' or 'switch-off'"):
        optpoline.Config(change=cast(Change, value))


@pytest.mark.parametrize("value", CHANGES)
def test_ways_to_change_sites(value: Change) -> None:
    assert optpoline.Config(change=value).is_switched_off == (value == "switch-off")
