# SPDX-License-Identifier: Apache-2.0
"""Where arenas go, in address spaces of several shapes."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from optpoline.model import Addr, Mapping
from optpoline.patch.placement import (
    ADDR_ALIGNMENT,
    GUARD_SIZE,
    HEAP_ROOM_SIZE,
    MIN_ADDR,
    STACK_ROOM_SIZE,
    USER_END,
    choose_arena_addr,
    is_within_reach,
)

MIB = 1 << 20
GIB = 1 << 30
SIZE = 16 * MIB


def mapping(start: int, end: int, path: str = "", perms: str = "rw-p") -> Mapping:
    """Return a mapping."""
    return Mapping(
        start=Addr(start), end=Addr(end), perms=perms, offset=0, device="00:00", inode=0, path=path
    )


TOP = (
    mapping(0x7FFD_0000_0000, 0x7FFD_0002_1000, "[stack]"),
    mapping(0x7FFD_0010_0000, 0x7FFD_0010_4000, "[vvar]", "r--p"),
    mapping(0x7FFD_0010_4000, 0x7FFD_0010_6000, "[vdso]", "r-xp"),
    mapping(0xFFFF_FFFF_FF60_0000, 0xFFFF_FFFF_FF60_1000, "[vsyscall]", "--xp"),
)
PIE = (
    mapping(0x5555_5555_4000, 0x5555_5560_0000, "/bin/program", "r-xp"),
    mapping(0x5555_5580_0000, 0x5555_55A0_0000, "[heap]"),
)
FIXED = (
    mapping(0x40_0000, 0x60_0000, "/bin/program", "r-xp"),
    mapping(0x120_0000, 0x140_0000, "[heap]"),
)
LIBRARIES = (
    mapping(0x7FA0_0000_0000, 0x7FA0_0020_0000, "/lib/a.so", "r-xp"),
    mapping(0x7FA0_0021_0000, 0x7FA0_0040_0000, "/lib/b.so", "r-xp"),
)


def check(maps: tuple[Mapping, ...], addr: int | None, start: int, end: int, size: int) -> None:
    """Check that an arena lies in free memory, within reach of all it serves."""
    assert addr is not None
    assert addr % ADDR_ALIGNMENT == 0
    assert addr >= MIN_ADDR - ADDR_ALIGNMENT
    assert addr + size < USER_END
    for one in maps:
        # Something stays free on both sides.
        assert addr + size + GUARD_SIZE // 2 <= one.start or one.end + GUARD_SIZE // 2 <= addr
    assert max(end - addr, addr + size - start) < 1 << 31


def test_pie_goes_just_below() -> None:
    maps = PIE + LIBRARIES + TOP
    addr = choose_arena_addr(maps, 0x5555_5555_4000, 0x5555_5560_0000, SIZE)
    check(maps, addr, 0x5555_5555_4000, 0x5555_5560_0000, SIZE)
    assert addr is not None
    assert 0 < 0x5555_5555_4000 - (addr + SIZE) < 2 * MIB


def test_fixed_program_has_no_room_below_and_leaves_room_for_its_heap() -> None:
    maps = FIXED + LIBRARIES + TOP
    addr = choose_arena_addr(maps, 0x40_0000, 0x60_0000, SIZE)
    check(maps, addr, 0x40_0000, 0x60_0000, SIZE)
    assert addr is not None
    assert addr >= 0x140_0000 + HEAP_ROOM_SIZE - ADDR_ALIGNMENT


def test_fixed_program_with_a_small_arena_goes_below() -> None:
    maps = FIXED + TOP
    addr = choose_arena_addr(maps, 0x40_0000, 0x60_0000, MIB)
    check(maps, addr, 0x40_0000, 0x60_0000, MIB)
    assert addr is not None
    assert addr < 0x40_0000


def test_library_cluster_goes_below_all_of_it() -> None:
    maps = PIE + LIBRARIES + TOP
    addr = choose_arena_addr(maps, 0x7FA0_0000_0000, 0x7FA0_0040_0000, SIZE)
    check(maps, addr, 0x7FA0_0000_0000, 0x7FA0_0040_0000, SIZE)
    assert addr is not None
    assert addr < 0x7FA0_0000_0000


def test_room_is_kept_below_the_stack() -> None:
    # All within reach below is taken; above, the stack comes soon.
    stack = mapping(0x7FA0_2000_0000, 0x7FA0_2002_1000, "[stack]")
    wall = mapping(0x7F00_0000_0000, 0x7FA0_0000_0000, "/dev/zero")
    maps = (wall, *LIBRARIES, stack, TOP[-1])
    addr = choose_arena_addr(maps, 0x7FA0_0000_0000, 0x7FA0_0040_0000, SIZE)
    check(maps, addr, 0x7FA0_0000_0000, 0x7FA0_0040_0000, SIZE)
    assert addr is not None
    assert addr + SIZE <= stack.start - STACK_ROOM_SIZE or addr >= stack.end


def test_gap_smaller_than_the_room_for_a_stack_is_no_gap() -> None:
    stack = mapping(0x7FA0_0100_0000 + 3 * SIZE, 0x7FA0_0100_0000 + 3 * SIZE + MIB, "[stack]")
    wall = mapping(0x7F00_0000_0000, 0x7FA0_0000_0000, "/dev/zero")
    ceiling = mapping(stack.end, stack.end + 4 * GIB, "/dev/zero")
    maps = (wall, *LIBRARIES, stack, ceiling)
    assert choose_arena_addr(maps, 0x7FA0_0000_0000, 0x7FA0_0040_0000, SIZE) is None


def test_nothing_within_reach() -> None:
    wall = mapping(MIN_ADDR, 0x5555_5555_4000, "/dev/zero")
    roof = mapping(0x5555_55A0_0000, 0x7F00_0000_0000, "/dev/zero")
    maps = (wall, *PIE, roof, *TOP)
    assert choose_arena_addr(maps, 0x5555_5555_4000, 0x5555_5560_0000, SIZE) is None


def test_module_as_large_as_the_reach() -> None:
    huge = mapping(0x5555_0000_0000, 0x5555_0000_0000 + 2 * GIB, "/bin/huge", "r-xp")
    assert choose_arena_addr((huge, *TOP), huge.start, huge.end, SIZE) is None
    large = mapping(0x5555_0000_0000, 0x5555_0000_0000 + 2 * GIB - 64 * MIB, "/bin/large", "r-xp")
    addr = choose_arena_addr((large, *TOP), large.start, large.end, SIZE)
    check((large, *TOP), addr, large.start, large.end, SIZE)


def test_never_above_what_a_program_may_map() -> None:
    # Address randomisation off: libraries end just below the stack, at the very top.
    libraries = mapping(0x7FFF_F7D0_0000, 0x7FFF_F7FF_F000, "/lib/a.so", "r-xp")
    stack = mapping(0x7FFF_FFFD_E000, 0x7FFF_FFFF_F000, "[stack]")
    wall = mapping(0x7FFF_0000_0000, libraries.start, "/dev/zero")
    maps = (wall, libraries, stack, TOP[-1])
    assert choose_arena_addr(maps, libraries.start, libraries.end, SIZE) is None


def test_gap_that_fits_exactly() -> None:
    end = 0x5555_5555_4000
    for slack in (-4096, 0, 4096, ADDR_ALIGNMENT):
        wall = mapping(MIN_ADDR, end - SIZE - 2 * GUARD_SIZE - slack, "/dev/zero")
        roof = mapping(PIE[-1].end, 0x7F00_0000_0000, "/dev/zero")
        maps = (wall, *PIE, roof)
        addr = choose_arena_addr(maps, end, PIE[0].end, SIZE)
        if slack < 0:
            assert addr is None
        else:
            check(maps, addr, end, PIE[0].end, SIZE)


@settings(max_examples=300, deadline=None)
@given(
    cuts=st.lists(st.integers(16, 1 << 21), min_size=4, max_size=60, unique=True),
    size=st.integers(1, 4096),
    data=st.data(),
)
def test_crowded_address_space(cuts: list[int], size: int, data: st.DataObject) -> None:
    # Mappings at page addresses anywhere in 8 GiB; the arena serves one or two of them.
    edges = [4096 * cut for cut in sorted(cuts)]
    maps = tuple(
        mapping(start, end, "/lib/a.so", "r-xp")
        for start, end in zip(edges[::2], edges[1::2], strict=False)
    )
    first = data.draw(st.integers(0, len(maps) - 1))
    last = data.draw(st.integers(first, min(first + 1, len(maps) - 1)))
    start, end = maps[first].start, maps[last].end
    addr = choose_arena_addr(maps, start, end, 4096 * size)
    if addr is not None:
        check(maps, addr, start, end, 4096 * size)


def test_reach_has_room_for_both_ends() -> None:
    assert is_within_reach(0, (1 << 31) - 2 * MIB)
    assert not is_within_reach(0, (1 << 31) - MIB)
    assert not is_within_reach((1 << 31) - MIB, 0)
