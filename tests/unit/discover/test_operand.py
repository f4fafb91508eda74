# SPDX-License-Identifier: Apache-2.0
"""The register that led to a target is dead exactly where no way from it reads it."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from optpoline.discover import ModuleImage, operand_dead_at
from optpoline.model import Addr

Build = Callable[..., Path]

NAMES = (
    "dead_at_once",
    "dead_in_a_loop",
    "dead_in_what_it_calls",
    "dead_on_both_ways",
    "live_across_what_it_calls",
    "live_call_of_another_thunk",
    "live_jump_to_another_thunk",
    "live_jump_to_its_thunk",
    "live_on_one_way",
    "live_passed_to_its_thunk",
    "live_returned",
)


@pytest.mark.parametrize("link", ["-static", "-static-pie", "-shared"])
def test_targets(build: Build, link: str) -> None:
    program = build("sites_operand.S", "-nostdlib", link)
    nm = subprocess.run(["nm", str(program)], check=True, capture_output=True, text=True)
    rows = (line.split() for line in nm.stdout.splitlines())
    addrs = {row[2]: int(row[0], 16) for row in rows if len(row) == 3}
    image = ModuleImage.from_file(str(program))
    dead = {name: operand_dead_at(image, Addr(addrs[name]), "rax") for name in NAMES}
    assert dead == {name: name.startswith("dead") for name in NAMES}


def test_address_outside_the_text(build: Build) -> None:
    image = ModuleImage.from_file(str(build("sites_operand.S", "-nostdlib", "-static")))
    assert not operand_dead_at(image, Addr(0x10), "rax")
