# SPDX-License-Identifier: Apache-2.0
"""Jump sites are refused exactly where an address they may reach reads the flags."""

from __future__ import annotations

import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from optpoline.discover import ModuleImage, find_sites, flags_dead_at
from optpoline.model import Addr, Refusal, SiteKind

Build = Callable[..., Path]
Strip = Callable[[Path], Path]

LINKS = ["-static", "-static-pie", "-shared"]

EXPECTED = {
    "dead_labels": None,
    "live_label": Refusal.FLAGS_LIVE,
    "live_carry": Refusal.FLAGS_LIVE,
    "live_shift": Refusal.FLAGS_LIVE,
    "live_lea": Refusal.FLAGS_LIVE,
    "live_cold": Refusal.FLAGS_LIVE,
    "live_taken": Refusal.FLAGS_LIVE,
    "cold_parent": None,
}


def refusals(program: Path, starts: dict[int, str]) -> dict[str, Refusal | None]:
    """Return the refusal of the jump site of each function."""
    found = find_sites(ModuleImage.from_file(str(program)))
    return {
        starts[site.function_addr]: site.refusal
        for site in found.sites
        if site.kind is SiteKind.JUMP and site.function_addr in starts
    }


def addrs_by_name(program: Path) -> dict[str, int]:
    listing = subprocess.run(
        ["nm", str(program)], check=True, capture_output=True, text=True
    ).stdout
    rows = (line.split() for line in listing.splitlines())
    return {row[2]: int(row[0], 16) for row in rows if len(row) == 3}


@pytest.mark.parametrize("link", LINKS)
def test_labels_with_live_flags(build: Build, strip: Strip, link: str) -> None:
    program = build("sites_flags.S", "-nostdlib", link)
    addrs = addrs_by_name(program)
    starts = {addrs[name]: name for name in EXPECTED}
    assert refusals(program, starts) == EXPECTED
    assert refusals(strip(program), starts) == EXPECTED


@pytest.mark.parametrize("link", LINKS)
def test_label_in_a_cold_part(build: Build, strip: Strip, link: str) -> None:
    program = build("sites_flags.S", "-nostdlib", link, "-DLIVE_COLD")
    addrs = addrs_by_name(program)
    starts = {addrs[name]: name for name in EXPECTED}
    assert refusals(program, starts)["cold_parent"] is Refusal.FLAGS_LIVE
    assert refusals(strip(program), starts)["cold_parent"] is Refusal.FLAGS_LIVE


def test_single_addresses(build: Build) -> None:
    program = build("sites_flags.S", "-nostdlib", "-static")
    addrs = addrs_by_name(program)
    image = ModuleImage.from_file(str(program))
    dead = ["dead_1", "dead_2", "dead_3", "live_1", "live_label", "__x86_indirect_thunk_rax"]
    live = ["live_2", "carry_1", "shift_1", "lea_1"]
    assert [name for name in dead if not flags_dead_at(image, Addr(addrs[name]))] == []
    assert [name for name in live if flags_dead_at(image, Addr(addrs[name]))] == []
    assert not flags_dead_at(image, Addr(0x10))
