# SPDX-License-Identifier: Apache-2.0
"""A home block is made to do another's work: when, in which steps, and what a kill leaves.

The arena is a real one on a memfd, with no program on the other side.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import cast

import pytest

from optpoline.controller.audit_arenas import ArenaJudge
from optpoline.controller.audit_scene import ArenaContents, CodeMap, read_table
from optpoline.controller.config import Config
from optpoline.controller.left_arenas import LeftArena
from optpoline.controller.reclaim import Reclaimer
from optpoline.controller.records import SiteRecord
from optpoline.controller.settling import LOOK_EVERY_S, MAX_WRITES, PATIENCE_S, SEEN_S, Settler
from optpoline.controller.summary import SiteState
from optpoline.errors import TargetFault
from optpoline.model import Addr, BlockPlan, Guard, Mapping, Miss, TreeNode
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import Block, add_block, redirect, redirection_of, rewrite
from optpoline.patch.grace import RetiredCode
from optpoline.patch.layout import ARENA_PATH, ArenaHeader, BlockState
from optpoline.x86.blocks import BLOCK_ALIGNMENT, LINE_SIZE, POISON
from tests.emulate.disassemble import disassemble
from tests.unit.controller.lone_arena import CODE, THUNK, make_arena, make_record, make_site
from tests.unit.patch.conftest import ARENA_ADDR, GEOMETRY, make_header

SITE = make_site()
CONFIG = Config(relink_after_s=1.0)
QUIET_S = 10.0
FEW = Guard(Addr(0x4F00_2000), None, Miss())
MANY = Guard(Addr(0x4F00_3000), None, Guard(Addr(0x4F00_4000), None, FEW))


def halved(number: int, n_levels: int) -> TreeNode:
    """Return a tree that is halved so often, chains of two guards at its ends."""
    first, second = Addr(0x4F00_8000 + 32 * number), Addr(0x4F00_8010 + 32 * number)
    if not n_levels:
        return Guard(first, None, Guard(second, None, Miss()))
    step = 1 << n_levels - 1
    return Guard(first, halved(number - step, n_levels - 1), halved(number + step, n_levels - 1))


@dataclass
class FakeReclaimer:
    """Grace periods that are over when a test says so."""

    awaited: list[RetiredCode] = field(default_factory=list)
    left: list[Addr] = field(default_factory=list)
    is_switching: bool = False

    def await_left(self, code: RetiredCode) -> None:
        """Note what is waited for."""
        self.awaited.append(code)

    def take_left(self) -> tuple[Addr, ...]:
        """Return what was said to be left."""
        left, self.left = tuple(self.left), []
        return left

    def cancel_left(self, starts: Iterable[Addr]) -> None:
        """Wait no more for some."""
        gone = set(starts)
        self.awaited = [code for code in self.awaited if code.start not in gone]
        self.left = [start for start in self.left if start not in gone]

    def end(self) -> None:
        """Let all grace periods be over."""
        self.left += [code.start for code in self.awaited]
        self.awaited.clear()


@pytest.fixture
def arena() -> Iterator[Arena]:
    """Return a small arena with no program on the other side."""
    fd = os.memfd_create("optpoline", os.MFD_CLOEXEC)
    os.ftruncate(fd, GEOMETRY.size)
    made = Arena(ARENA_ADDR, fd, GEOMETRY, make_header())
    os.close(fd)
    made.journal(SITE)
    yield made
    made.close()


def write(arena: Arena, tree: TreeNode, slack_ratio: float = 0.0) -> Block:
    """Write a promoted block of the only site."""
    plan = BlockPlan(
        operand="rax", tree=tree, thunk_addr=THUNK.addr, miss_count_addr=arena.add_counters(1)
    )
    return add_block(arena, plan, site_addr=SITE.addr, slack_ratio=slack_ratio)


def promoted_anew(arena: Arena, slack_ratio: float = 3.0) -> SiteRecord:
    """Return a site whose home leads on to a bigger block."""
    record = make_record(arena, SITE, SiteState.PROMOTED)
    record.home = write(arena, FEW, slack_ratio)
    record.active = write(arena, MANY)
    redirect(record.home, record.active.addr)
    return record


def code_of(arena: Arena, block: Block) -> bytes:
    """Return what the encoder makes of a block's plan where it is."""
    return arena.templates.encode(block.plan, block.addr).code


class Walk:
    """A settler and its time."""

    def __init__(self, record: SiteRecord) -> None:
        """Begin long after the site was promoted."""
        self.record = record
        self.reclaimer = FakeReclaimer()
        self.settler = Settler(CONFIG, cast(Reclaimer, self.reclaimer))
        self.now_s = QUIET_S

    def step(self, seconds: float = LOOK_EVERY_S) -> int:
        """Let time pass and take a step."""
        self.now_s += seconds
        return self.settler.step([self.record], self.now_s)


# --- the steps


def test_home_does_the_work_of_the_block_that_it_led_to(arena: Arena) -> None:
    record = promoted_anew(arena)
    home, active = record.home, record.active
    assert home is not None
    assert active is not None
    walk = Walk(record)
    assert walk.step() == 0
    # All but the first byte, which anybody may stand at.
    assert walk.reclaimer.awaited == [RetiredCode(Addr(home.addr + 1), Addr(home.addr + home.size))]
    body = arena.read(home.addr, home.size)
    assert walk.step() == 0
    assert arena.read(home.addr, home.size) == body
    walk.reclaimer.end()
    assert walk.step(0.001) == 0
    assert record.active is active
    assert redirection_of(arena, home.addr) == active.addr
    assert walk.step(SEEN_S / 2) == 0
    assert walk.step(SEEN_S) == 1
    assert record.home is record.active is not None
    settled = record.home
    assert (settled.addr, settled.plan.tree) == (home.addr, MANY)
    assert arena.read(settled.addr, settled.size) == code_of(arena, settled)
    # Threads may count in the other one for long: that is not its home's cell.
    assert settled.plan.miss_count_addr == home.plan.miss_count_addr
    (entry,) = [block for block in arena.blocks if block.addr == home.addr]
    assert (entry.state, entry.size, entry.head) == (BlockState.LIVE, settled.size, settled.head)
    assert not walk.settler.is_settling(record)


@pytest.mark.parametrize("off", [16, 32, 48])
def test_halves_lie_in_lines_wherever_home_begins(arena: Arena, off: int) -> None:
    for _ in range(off // BLOCK_ALIGNMENT):
        write(arena, Miss())
    record = make_record(arena, SITE, SiteState.PROMOTED)
    record.home = write(arena, Miss(), 40.0)
    assert record.home.addr % LINE_SIZE == off
    record.active = write(arena, halved(8, 3))
    redirect(record.home, record.active.addr)
    walk = Walk(record)
    walk.step()
    for _ in range(2):
        walk.reclaimer.end()
        walk.step()
    home = record.home
    assert (home, home.addr % LINE_SIZE) == (record.active, off)
    code = arena.read(home.addr, home.size)
    ends = ends_of_halves(code, home.addr)
    assert len(ends) == 4
    assert all(first // LINE_SIZE == last // LINE_SIZE for first, last in ends)
    assert code.count(bytes((POISON,)) * 2)
    assert judge(arena.read(ARENA_ADDR, GEOMETRY.size), record)[0] == []


def ends_of_halves(code: bytes, addr: Addr) -> list[tuple[int, int]]:
    """Return the first and the last byte of each half that is not halved again."""
    insns = disassemble(code, addr)
    starts = {insn.branch_addr for insn in insns if insn.mnemonic in ("jb", "ja")}
    found: list[tuple[int, int]] = []
    for number, insn in enumerate(insns):
        if addr + insn.off in starts:
            end = next(at for at in insns[number:] if at.mnemonic in ("jmp", "incq", "jb", "ja"))
            if end.mnemonic in ("jmp", "incq"):
                n_behind = -1 if end.mnemonic == "incq" else end.size
                found.append((addr + insn.off, addr + end.off + n_behind))
    return found


def test_quiet_first(arena: Arena) -> None:
    record = promoted_anew(arena)
    walk = Walk(record)
    record.changed_s = walk.now_s
    walk.step(CONFIG.relink_after_s / 2)
    assert walk.reclaimer.awaited == []
    assert walk.settler.is_settling(record)
    walk.step(CONFIG.relink_after_s)
    assert len(walk.reclaimer.awaited) == 1


@pytest.mark.parametrize("when", ["waiting", "written"])
def test_promoted_anew_meanwhile(arena: Arena, when: str) -> None:
    record = promoted_anew(arena)
    walk = Walk(record)
    walk.step()
    if when == "written":
        walk.reclaimer.end()
        walk.step(0.001)
    newest = write(arena, FEW)
    assert record.home is not None
    assert record.active is not None
    redirect(record.active, newest.addr)
    redirect(record.home, newest.addr)
    record.active = newest
    walk.reclaimer.end()
    for _ in range(3):
        walk.step()
        assert redirection_of(arena, record.home.addr) in (newest.addr, None)
        walk.reclaimer.end()
    walk.step()
    assert record.home is record.active
    assert record.home.plan.tree is FEW


@pytest.mark.parametrize("end", ["refused", "demoted", "relinked"])
def test_no_longer_its_home_meanwhile(arena: Arena, end: str) -> None:
    record = promoted_anew(arena)
    home = record.home
    assert home is not None
    walk = Walk(record)
    walk.step()
    if end == "relinked":
        record.home = record.active
    else:
        redirect(home, THUNK.addr)
        record.active = None
        record.state = SiteState.REFUSED if end == "refused" else SiteState.BASELINE
    before = arena.read(home.addr, home.size)
    walk.reclaimer.end()
    for _ in range(3):
        assert walk.step() == 0
    assert arena.read(home.addr, home.size) == before
    assert not walk.settler.is_settling(record)


def test_home_without_room_is_left_to_a_stop(arena: Arena) -> None:
    record = promoted_anew(arena, slack_ratio=0.0)
    walk = Walk(record)
    walk.step()
    assert walk.reclaimer.awaited == []
    assert not walk.settler.is_settling(record)


def test_free_memory_behind_home_is_room(arena: Arena) -> None:
    record = make_record(arena, SITE, SiteState.PROMOTED)
    record.active = write(arena, MANY)
    record.home = write(arena, FEW)
    redirect(record.home, record.active.addr)
    free_before = arena.free_code_size
    written = rewrite(record.home, record.active.plan, record.active.addr)
    assert written is not None
    assert arena.read(Addr(written.addr + 8), written.size - 8) == code_of(arena, written)[8:]
    assert arena.free_code_size < free_before
    behind = write(arena, FEW)
    assert behind.addr >= written.addr + written.size


def test_somebody_who_stays_inside_is_not_waited_for(arena: Arena) -> None:
    record = promoted_anew(arena)
    assert record.home is not None
    walk = Walk(record)
    walk.step()
    walk.step(PATIENCE_S)
    assert not walk.settler.is_settling(record)
    assert walk.reclaimer.awaited == []  # nobody is looked for any more
    walk.reclaimer.left = [Addr(record.home.addr + 1)]
    assert walk.step() == 0
    assert record.home is not record.active


def test_a_program_that_switches_stacks_is_left_to_stops(arena: Arena) -> None:
    record = promoted_anew(arena)
    walk = Walk(record)
    walk.step()
    assert len(walk.reclaimer.awaited) == 1
    walk.reclaimer.is_switching = True  # found out by the first look
    walk.step()
    assert walk.reclaimer.awaited == []
    assert not walk.settler.is_settling(record)
    assert record.home is not record.active
    record.active = write(arena, FEW)
    assert record.home is not None
    redirect(record.home, record.active.addr)
    walk.step()
    assert walk.reclaimer.awaited == []
    assert not walk.settler.is_settling(record)


def test_many_homes_are_written_a_few_at_a_time() -> None:
    n_sites = 2 * MAX_WRITES + 10
    arena = make_arena(n_sites=n_sites)
    records = [make_record(arena, make_site(i), SiteState.PROMOTED) for i in range(n_sites)]
    for record in records:
        record.home = write(arena, FEW, 3.0)
        record.active = write(arena, MANY)
        redirect(record.home, record.active.addr)
    reclaimer = FakeReclaimer()
    settler = Settler(CONFIG, cast(Reclaimer, reclaimer))
    settler.step(records, QUIET_S)
    assert len(reclaimer.awaited) == n_sites
    reclaimer.end()
    n_written = []
    for number in range(3):
        settler.step(records, QUIET_S + number * SEEN_S / 4)
        n_written.append(sum(r.home is not None and r.home.plan.tree is MANY for r in records))
    assert n_written == [MAX_WRITES, 2 * MAX_WRITES, n_sites]
    assert settler.step(records, QUIET_S + 2 * SEEN_S) == n_sites
    assert all(record.home is record.active for record in records)
    arena.close()


def test_promoted_anew_while_it_waits_to_be_written() -> None:
    arena = make_arena(n_sites=MAX_WRITES + 1)
    records = [make_record(arena, make_site(i), SiteState.PROMOTED) for i in range(MAX_WRITES + 1)]
    for record in records:
        record.home = write(arena, MANY)
        record.active = write(arena, MANY)
        redirect(record.home, record.active.addr)
    reclaimer = FakeReclaimer()
    settler = Settler(CONFIG, cast(Reclaimer, reclaimer))
    settler.step(records, QUIET_S)
    reclaimer.end()
    settler.step(records, QUIET_S)
    last = records[-1]
    assert last.home is not None
    assert last.active is not None
    newest = write(arena, FEW)
    redirect(last.active, newest.addr)
    redirect(last.home, newest.addr)
    last.active = newest
    settler.step(records, QUIET_S)
    settler.step(records, QUIET_S + 2 * SEEN_S)
    assert last.home is last.active
    assert last.home.plan.tree is FEW
    assert reclaimer.awaited == []
    arena.close()


# --- a controller that is killed


class Watched:
    """Memory that is looked at after each store, of at most 16 bytes."""

    def __init__(self, memory: memoryview, look: list[bytes]) -> None:
        """Write to ``memory``; add what there is to ``look``."""
        self._memory, self._look = memory, look

    def __getitem__(self, key: int | slice) -> object:
        """Read."""
        found = self._memory[key]
        return bytes(found) if isinstance(found, memoryview) else found

    def __setitem__(self, key: int | slice, value: int | bytes) -> None:
        """Write, and look."""
        if isinstance(key, int):
            assert isinstance(value, int)
            self._memory[key] = value
            self._look.append(bytes(self._memory.cast("B")))
            return
        assert isinstance(value, bytes)
        for off in range(0, len(value), 16):
            piece = value[off : off + 16]
            self._memory[key.start + off : key.start + off + len(piece)] = piece
            self._look.append(bytes(self._memory))


class Snapshot:
    """The program's memory at one instant: an arena, and nothing else that can be read."""

    def __init__(self, data: bytes) -> None:
        """Keep it."""
        self._data = data

    def read(self, addr: int, size: int) -> bytes:
        """Read from the arena."""
        off = addr - ARENA_ADDR
        if not 0 <= off <= off + size <= len(self._data):
            raise TargetFault(addr, size, "read")
        return self._data[off : off + size]


def part(first: int, last: int, perms: str) -> Mapping:
    """Return a mapping of a part of the arena."""
    return Mapping(
        start=Addr(ARENA_ADDR + first), end=Addr(ARENA_ADDR + last), perms=perms, offset=first,
        device="00:01", inode=5, path=ARENA_PATH,
    )  # fmt: skip


PARTS = (
    part(0, GEOMETRY.code_off, "r--s"),
    part(GEOMETRY.code_off, GEOMETRY.counter_off, "r-xs"),
    part(GEOMETRY.counter_off, GEOMETRY.size, "rw-s"),
)
TEXT = Mapping(
    start=Addr(0x4F00_0000), end=Addr(0x4F10_0000), perms="r-xp", offset=0,
    device="00:01", inode=6, path="/bin/program",
)  # fmt: skip


def judge(data: bytes, record: SiteRecord) -> tuple[list[str], list[str]]:
    """Return the faults and remarks of an audit of a snapshot, and check the site's way."""
    memory = Snapshot(data)
    header = ArenaHeader.unpack(data)
    assert header is not None
    left = LeftArena(parts=PARTS, header=header, history=(record.entry,))
    table = read_table(memory, left, header)
    start, end = GEOMETRY.code_off, GEOMETRY.literal_off
    contents = ArenaContents(
        arena=left, header=header, before=table, code=data[start:end], after=table
    )
    arena_judge = ArenaJudge(memory, CodeMap((TEXT, *PARTS)), (contents,))
    faults = [str(one.what) for one in arena_judge.judge(contents)]
    assert record.home is not None
    if not arena_judge.is_block_of(record.home.addr, SITE.addr):
        faults.append("its text leads to no block")
    return faults, arena_judge.remarks


@pytest.mark.parametrize("is_bigger", [False, True])
def test_killed_at_every_store(arena: Arena, is_bigger: bool) -> None:
    """Whoever looks then finds an arena that is whole, and code that is led to."""
    assert SITE.code == CODE
    record = make_record(arena, SITE, SiteState.PROMOTED)
    record.home = write(arena, *((FEW, 4.0) if is_bigger else (MANY, 0.0)))
    record.active = write(arena, MANY if is_bigger else FEW)
    redirect(record.home, record.active.addr)
    looks: list[bytes] = []
    view = memoryview(arena._memory.mapped)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(arena._memory, "mapped", Watched(view, looks))
        patch.setattr(arena._memory, "_words", Watched(view.cast("Q"), looks))
        assert rewrite(record.home, record.active.plan, record.active.addr) is not None
    assert len(looks) > 10
    n_remarks = 0
    for data in looks:
        faults, remarks = judge(data, record)
        assert faults == []
        n_remarks += "was being rewritten" in " ".join(remarks)
        # Who enters goes on to the other block, whole at every instant.
        head = data[record.home.addr - ARENA_ADDR :][:6]
        disp = record.active.addr - record.home.addr - 5
        assert head == b"\xe9" + disp.to_bytes(4, "little", signed=True) + bytes((POISON,))
    assert 0 < n_remarks < len(looks)
    view.release()
    # The test can fail: what is not covered by that state is a fault.
    broken = bytearray(looks[-1])
    broken[record.home.addr - ARENA_ADDR + 9] ^= 1
    assert judge(bytes(broken), record)[0]
