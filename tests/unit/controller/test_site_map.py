# SPDX-License-Identifier: Apache-2.0
"""Synthetic samples name the sites that they are of, and no others.

The program: ``caller`` calls through the rax thunk, ``tail`` ends in a jump through it,
``dispatch`` is a loop of computed gotos, and ``many`` has more sites than one sample names.
"""

from __future__ import annotations

from typing import cast

import pytest

from optpoline.controller.records import SiteRecord
from optpoline.controller.site_map import MAX_SITES_NEAR, Evidence, SiteMap
from optpoline.controller.summary import SiteState
from optpoline.discover.functions import Span
from optpoline.learn.counting import SiteCounts
from optpoline.model import Addr, Count, Site, SiteKind, Thunk, ThunkFlavour
from optpoline.patch.arena import Arena
from optpoline.patch.layout import JournalEntry
from optpoline.process.perf import PcSample

RAX = Span(Addr(0x9000), Addr(0x9011))
RDX = Span(Addr(0x9020), Addr(0x9031))
STORE, RET, PAUSE = 12, 16, 5
"""Offsets in a thunk: the store of the target, the ret, and what is never reached."""

CALLER = Span(Addr(0x1000), Addr(0x1100))
TAIL = Span(Addr(0x2000), Addr(0x2100))
DISPATCH = Span(Addr(0x3000), Addr(0x3400))
MANY = Span(Addr(0x4000), Addr(0x6000))
PLAIN = Span(Addr(0x7000), Addr(0x7100))
FUNCTIONS = (CALLER, TAIL, DISPATCH, MANY, PLAIN)

TAIL_CALLED_UNTIL = Addr(0x7025)
"""Where a direct call of ``tail`` returns to."""
THUNK_CALLED_UNTIL = Addr(0x7035)
"""Where a call site returns to that there is no record of."""
CALLEES = {TAIL_CALLED_UNTIL: TAIL.start, THUNK_CALLED_UNTIL: RAX.start}

JUNK = 0x7FFF_0000_1234


def make_record(addr: int, kind: SiteKind, thunk: Span = RAX) -> SiteRecord:
    """Return a site on its baseline."""
    disp = (thunk.start - (addr + 5)).to_bytes(4, "little", signed=True)
    site = Site(
        addr=Addr(addr),
        code=(b"\xe8" if kind is SiteKind.CALL else b"\xe9") + disp,
        kind=kind,
        disp_addr=Addr(addr + 1),
        thunk=Thunk(addr=thunk.start, operand="rax", flavour=ThunkFlavour.GCC, symbol=None),
        module="/bin/program",
        function=None,
        function_addr=None,
    )
    return SiteRecord(
        site=site,
        arena=cast(Arena, None),
        state=SiteState.BASELINE,
        entry=JournalEntry(addr=site.addr, code=site.code, disp_off=1),
        inode=1,
        branch=site.code[1:5],
    )


class Program:
    """The sites of the program and their map."""

    def __init__(self) -> None:
        """Make them."""
        self.call = make_record(0x1010, SiteKind.CALL)
        self.other_call = make_record(0x1030, SiteKind.CALL)
        self.tail = make_record(0x2040, SiteKind.JUMP)
        self.tail_rdx = make_record(0x2050, SiteKind.JUMP, RDX)
        self.gotos = [make_record(0x3000 + 0x40 * n, SiteKind.JUMP, RDX) for n in range(10)]
        self.many = [make_record(0x4000 + 0x10 * n, SiteKind.CALL) for n in range(512)]
        singles = [self.call, self.other_call, self.tail, self.tail_rdx]
        self.map = SiteMap(
            [*self.many, *self.gotos, *singles],
            thunks=[RDX, RAX],
            function_at=lambda addr: next((span for span in FUNCTIONS if addr in span), None),
            callee_before=CALLEES.get,
        )

    def weigh(self, pc: int, *stack: int, count: int = 1) -> Evidence:
        """Weigh one sample."""
        return self.map.weigh([PcSample(tid=1, pc=Addr(pc), stack=stack, count=count)])


@pytest.fixture
def program() -> Program:
    return Program()


@pytest.mark.parametrize(
    ("off", "words"),
    [(0, ()), (STORE, (RAX.start + PAUSE,)), (RET, (PLAIN.start,)), (RET, (JUNK,))],
)
def test_a_call_site_is_named_by_its_return_address(
    program: Program, off: int, words: tuple[int, ...]
) -> None:
    evidence = program.weigh(RAX.start + off, *words, program.call.site.end, JUNK, count=7)
    assert evidence.branching == {program.call.site.addr: 7}
    assert not evidence.unnamed
    assert not evidence.nearby
    assert (evidence.n_samples, evidence.n_known) == (7, 0)


def test_a_return_address_elsewhere_on_the_stack_names_nobody(program: Program) -> None:
    evidence = program.weigh(RAX.start, JUNK, program.call.site.end)
    assert evidence.unnamed == {RAX.start: 1}
    assert not evidence.branching


def test_a_call_site_of_another_thunk_is_not_it(program: Program) -> None:
    evidence = program.weigh(RDX.start, program.call.site.end)
    assert not evidence.branching


def test_a_site_that_leads_to_a_block_is_known(program: Program) -> None:
    program.call.state = SiteState.PROMOTED
    evidence = program.weigh(RAX.start, program.call.site.end, count=3)
    assert evidence.n_known == 3
    assert not evidence.branching


def test_a_site_without_a_record_is_known(program: Program) -> None:
    evidence = program.weigh(RAX.start, THUNK_CALLED_UNTIL)
    assert evidence.n_known == 1
    assert not evidence.unnamed


@pytest.mark.parametrize(("off", "words"), [(0, ()), (STORE, (RAX.start + PAUSE,)), (RET, (JUNK,))])
def test_a_tail_call_is_told_by_who_was_called(
    program: Program, off: int, words: tuple[int, ...]
) -> None:
    evidence = program.weigh(RAX.start + off, *words, TAIL_CALLED_UNTIL)
    assert evidence.branching == {program.tail.site.addr: 1}


def test_the_thunk_tells_the_jumps_of_one_function_apart(program: Program) -> None:
    evidence = program.weigh(RDX.start, TAIL_CALLED_UNTIL)
    assert evidence.branching == {program.tail_rdx.site.addr: 1}


def test_a_computed_goto_is_told_by_where_it_goes(program: Program) -> None:
    evidence = program.weigh(RDX.start + RET, DISPATCH.start + 0x123, JUNK)
    assert evidence.branching.keys() == {record.site.addr for record in program.gotos}
    assert sum(evidence.branching.values()) == pytest.approx(1)


def test_the_start_of_a_function_is_no_label(program: Program) -> None:
    evidence = program.weigh(RDX.start + RET, DISPATCH.start, JUNK)
    assert evidence.unnamed == {RDX.start: 1}


def test_a_tail_call_behind_a_promoted_call(program: Program) -> None:
    """The return address is the call site's, the time is spent by what it called."""
    program.call.state = SiteState.PROMOTED
    counts = (Count(target=TAIL.start, hit_count=9), Count(target=PLAIN.start, hit_count=1))
    program.call.counts = SiteCounts(counts=counts, n_unknown=0)
    evidence = program.weigh(RAX.start, program.call.site.end)
    assert evidence.branching == {program.tail.site.addr: 1}
    evidence = program.weigh(RDX.start, program.call.site.end)
    assert evidence.branching == {program.tail_rdx.site.addr: 1}


def test_who_stands_at_the_start_of_a_target_has_just_branched(program: Program) -> None:
    evidence = program.weigh(PLAIN.start, program.call.site.end, JUNK, count=2)
    assert evidence.branching == {program.call.site.addr: 2}
    assert not evidence.nearby


def test_so_has_who_was_sent_on_by_a_tail_call(program: Program) -> None:
    evidence = program.weigh(PLAIN.start, TAIL_CALLED_UNTIL, JUNK)
    parts = {program.tail.site.addr: 0.5, program.tail_rdx.site.addr: 0.5}
    assert evidence.branching == parts
    program.call.state = SiteState.PROMOTED
    program.call.counts = SiteCounts(counts=(Count(target=TAIL.start, hit_count=9),), n_unknown=0)
    assert program.weigh(PLAIN.start, program.call.site.end).branching == parts


def test_who_was_called_directly_has_not(program: Program) -> None:
    evidence = program.weigh(TAIL.start, TAIL_CALLED_UNTIL)
    assert not evidence.branching


def test_who_came_by_a_guard_has_not(program: Program) -> None:
    program.call.state = SiteState.PROMOTED
    program.call.counts = SiteCounts(counts=(Count(target=PLAIN.start, hit_count=9),), n_unknown=0)
    evidence = program.weigh(PLAIN.start, program.call.site.end)
    assert not evidence.branching
    assert not evidence.nearby


def test_a_callee_names_the_call_site_that_it_returns_to(program: Program) -> None:
    evidence = program.weigh(PLAIN.start + 8, JUNK, program.call.site.end, program.many[0].site.end)
    assert evidence.nearby == {program.call.site.addr: 1}
    assert not evidence.branching


def test_other_code_names_the_sites_of_its_function(program: Program) -> None:
    evidence = program.weigh(CALLER.start, JUNK)
    assert evidence.nearby == {program.call.site.addr: 0.5, program.other_call.site.addr: 0.5}


def test_of_many_sites_those_close_by(program: Program) -> None:
    for pc in (MANY.start, MANY.start + 0x1008, MANY.end - 1):
        named = sorted(program.weigh(pc).nearby)
        assert len(named) == MAX_SITES_NEAR
        assert named[-1] - named[0] == (MAX_SITES_NEAR - 1) * 0x10
        assert min(abs(addr - pc) for addr in named) <= 0x10


def test_code_without_sites_names_none(program: Program) -> None:
    evidence = program.weigh(PLAIN.start, JUNK)
    assert evidence.n_samples == 1
    assert not evidence.branching
    assert not evidence.nearby
    assert not evidence.unnamed


def test_no_stack_no_name(program: Program) -> None:
    assert program.weigh(RAX.start + RET).unnamed == {RAX.start: 1}


def test_jumps_of_a_thunk(program: Program) -> None:
    program.gotos[0].state = SiteState.REFUSED
    expected = [program.tail_rdx, *program.gotos[1:]]
    assert program.map.jumps_through(RDX.start) == expected


def test_sites_are_found_by_their_address(program: Program) -> None:
    assert program.map.record_at(Addr(0x2040)) is program.tail
    assert program.map.record_at(Addr(0x2041)) is None
    assert program.map.record_at(Addr(0xFFFF)) is None
