# SPDX-License-Identifier: Apache-2.0
"""When blocks may use the program's restartable sequences, and who still does."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from optpoline.errors import TargetFault
from optpoline.model import Addr, RseqAbi
from optpoline.process.cpus import MAX_CPUS, read_n_possible_cpus
from optpoline.process.rseq import RseqRegistration, choose_rseq_abi, find_rseq_holders

POINTER, OTHER_POINTER = 0x7F00_0000_0740, 0x7F00_1000_0740
OFFSET = 0x9A0
SIGNATURE = 0x5305_3053


def registration(tid: int, pointer: int = POINTER, offset: int = OFFSET) -> RseqRegistration:
    """Return a thread's registration."""
    return RseqRegistration(
        tid=tid, thread_pointer=pointer, area_addr=pointer + offset, signature=SIGNATURE
    )


ONE, OTHER = registration(1), registration(2, OTHER_POINTER)
ABI = RseqAbi(offset=OFFSET, signature=SIGNATURE)


class Words:
    """Memory with a few words in it."""

    def __init__(self, words: dict[int, bytes]) -> None:
        """Keep them."""
        self._words = words

    def read(self, addr: int, size: int) -> bytes:
        """Return one of them."""
        if addr not in self._words:
            raise TargetFault(Addr(addr), size)
        return self._words[addr][:size]


NOTHING = Words({})


def test_threads_that_agree() -> None:
    assert choose_rseq_abi([ONE], NOTHING) == ABI
    assert choose_rseq_abi([ONE, OTHER], NOTHING) == ABI
    below = [registration(1, offset=-0x40), registration(2, OTHER_POINTER, -0x40)]
    assert choose_rseq_abi(below, NOTHING) == RseqAbi(offset=-0x40, signature=SIGNATURE)


def test_nobody_has_registered() -> None:
    assert choose_rseq_abi([], NOTHING) is None
    assert choose_rseq_abi([replace(ONE, area_addr=0)], NOTHING) is None


@pytest.mark.parametrize(
    "other",
    [
        registration(2, OTHER_POINTER, OFFSET + 32),
        replace(OTHER, signature=1),
        replace(OTHER, thread_pointer=0),
    ],
)
def test_threads_that_disagree(other: RseqRegistration) -> None:
    assert choose_rseq_abi([ONE, other], NOTHING) is None
    assert choose_rseq_abi([other, ONE], NOTHING) is None


def test_a_far_area_is_believed_if_two_threads_have_it() -> None:
    far = [registration(1, offset=-0x20_0000), registration(2, OTHER_POINTER, -0x20_0000)]
    assert choose_rseq_abi(far[:1], NOTHING) is None
    assert choose_rseq_abi(far, NOTHING) == RseqAbi(offset=-0x20_0000, signature=SIGNATURE)


def test_areas_that_no_displacement_reaches_or_that_are_not_aligned() -> None:
    for offset in (1 << 31, -(1 << 31) - 32, OFFSET + 8):
        found = [registration(1, offset=offset), registration(2, OTHER_POINTER, offset)]
        assert choose_rseq_abi(found, NOTHING) is None


@pytest.mark.parametrize(
    ("cpu_id", "is_believed"), [(-1, True), (-2, True), (0, False), (3, False), (None, False)]
)
def test_a_thread_without_a_registration(cpu_id: int | None, is_believed: bool) -> None:
    """Only memory that looks as if it had never been registered may be written by blocks."""
    words = {}
    if cpu_id is not None:
        words[OTHER.area_addr + 4] = cpu_id.to_bytes(4, "little", signed=True)
    found = choose_rseq_abi([ONE, replace(OTHER, area_addr=0)], Words(words))
    assert found == (ABI if is_believed else None)


def test_a_thread_that_has_not_run_yet() -> None:
    """Its memory is new, or another's of before."""
    newborn = replace(OTHER, area_addr=0, is_newborn=True)
    assert choose_rseq_abi([ONE, newborn], NOTHING) == ABI
    assert choose_rseq_abi([newborn], NOTHING) is None
    assert choose_rseq_abi([ONE, replace(OTHER, signature=1, is_newborn=True)], NOTHING) is None


@pytest.mark.parametrize("area_addr", [0, ONE.area_addr])
def test_two_threads_with_one_area(area_addr: int) -> None:
    """The number of one's CPU is no better than any for the other: it lost 1 count in 200."""
    kin = replace(ONE, tid=2, area_addr=area_addr)
    assert choose_rseq_abi([ONE, kin], NOTHING) is None
    assert choose_rseq_abi([OTHER, kin, ONE], NOTHING) is None


def test_who_still_points_into_an_arena() -> None:
    ranges = [(Addr(0x1000), Addr(0x2000)), (Addr(0x5000), Addr(0x6000))]
    for value, is_held in ((0, 0), (0xFFF, 0), (0x1000, 1), (0x1FFF, 1), (0x2000, 0), (0x5800, 1)):
        memory = Words(
            {ONE.area_addr + 8: bytes(8), OTHER.area_addr + 8: value.to_bytes(8, "little")}
        )
        found = find_rseq_holders([ONE, OTHER], memory, ranges)
        assert found == ((2,) if is_held else ())
    assert find_rseq_holders([replace(ONE, area_addr=0), OTHER], NOTHING, ranges) == ()


@pytest.mark.parametrize(
    ("told", "expected"),
    [
        ("0\n", 1),
        ("0-1\n", 2),
        ("0-255\n", 256),
        ("0,2-3,8-11\n", 12),
        ("0-3,7\n", 8),
        ("", MAX_CPUS),
    ],
)
def test_possible_cpus(tmp_path: Path, told: str, expected: int) -> None:
    path = tmp_path / "possible"
    path.write_text(told)
    assert read_n_possible_cpus(path) == expected


def test_possible_cpus_without_sysfs(tmp_path: Path) -> None:
    assert read_n_possible_cpus(tmp_path / "possible") == MAX_CPUS
