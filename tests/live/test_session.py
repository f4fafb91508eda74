# SPDX-License-Identifier: Apache-2.0
"""Whole sessions on a program that checks itself: promoted, right, and restored."""

from __future__ import annotations

from collections.abc import Sequence

import capstone
import pytest

import optpoline
from optpoline.controller import first_window
from optpoline.controller.audit import audit
from optpoline.controller.events import Event, EventKind
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.model import Refusal
from optpoline.patch.blocks import Block
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, VARIANTS, Witness, arena_mappings

pytestmark = pytest.mark.live

LEARN_S = 0.2


def _check_mappings(session: optpoline.Session) -> None:
    """No page writable and executable; an arena's parts have the rights they need only."""
    maps = read_maps(session.pid)
    assert not [m for m in maps if m.is_writable and m.is_executable]
    assert {m.perms for m in arena_mappings(session.pid)} == {"r--s", "r-xs", "rw-s"}


def _check_sites(session: optpoline.Session) -> None:
    """Each site holds its baseline or a branch to a block of ours."""
    code = [(a.code_start, a.used_code_end) for a in session.target.arenas]
    with RemoteMemory(session.pid) as memory:
        for record in session.records:
            site = record.site
            now = memory.read(site.addr, len(site.code))
            off = site.disp_addr - site.addr
            assert now[:off] == site.code[:off]
            dst = site.end + int.from_bytes(now[off : off + 4], "little", signed=True)
            if record.state is SiteState.PROMOTED:
                assert any(first <= dst < last and dst % 16 == 0 for first, last in code)
            else:
                assert now == site.code


def _check_no_indirect_branch(session: optpoline.Session) -> None:
    """Decode each block as far as it goes: compares and direct branches only."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    for record in session.records:
        for block in _blocks_of(record):
            code = record.arena.read(block.addr, block.size)
            decoded = 0
            for insn in decoder.disasm(code, block.addr):
                decoded += insn.size
                assert insn.mnemonic not in ("call", "ret", "syscall", "pushfq", "popfq"), insn
                if insn.mnemonic.startswith("j"):
                    assert insn.op_str.startswith("0x"), insn
            assert decoded == len(code)


def _blocks_of(record: SiteRecord) -> list[Block]:
    """Return the blocks a site goes through."""
    return [block for block in (record.home, record.active) if block is not None]


def _check_sealed(target: LiveTarget) -> None:
    """The program itself gets no write access to anything but the counters."""
    for mapping in arena_mappings(target.pid):
        answer = target.ask(f"mprotect {mapping.start:x} {mapping.size:x}")
        # EACCES: there is no way to a writable mapping of a sealed file.
        assert answer == ("mprotect 0 0" if mapping.is_writable else "mprotect -1 13")


@pytest.mark.parametrize("n_threads", [1, 4])
@pytest.mark.parametrize("variant", list(VARIANTS))
def test_promoted_and_restored(start_target: StartTarget, variant: str, n_threads: int) -> None:
    target = start_target("promote", str(n_threads), flags=VARIANTS[variant])
    target.ask("3")
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        summary = session.summary()
        kinds = [site.kind for site in summary.sites if site.state is SiteState.PROMOTED]
        # The call, the tail call and the computed gotos (merged into some by gcc).
        assert "call" in kinds
        assert kinds.count("jump") >= 3
        assert summary.hit_rate is not None
        assert summary.hit_rate > 0.99
        _check_mappings(session)
        _check_sites(session)
        _check_no_indirect_branch(session)
        assert before.changed_bytes(target.pid)
        session.watch(0.3)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_learned_in_turn(start_target: StartTarget, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(first_window, "GROUP_SITES", 1)
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    linked: list[int] = []
    with optpoline.attach(target.pid) as session:
        link = session._work.window._link

        def watched(
            prepared: first_window._Prepared, done: Sequence[SiteRecord] = ()
        ) -> list[SiteRecord]:
            found = link(prepared, done)
            linked.append(sum(record.home is not None for record in session.records))
            return found

        monkeypatch.setattr(session._work.window, "_link", watched)
        session.learn(0.4, in_turn=True)
        assert linked == [1, 1, 1, 1]
        assert session.promote() == 4
        assert audit(target.pid).is_sound
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_who_is_told_of_a_promotion_raises(start_target: StartTarget) -> None:
    """What was promoted is looked after all the same."""

    def tell(event: Event) -> None:
        if event.kind is EventKind.PROMOTED:
            raise ValueError(event.message)

    target = start_target("promote", "1", flags=RETPOLINE)
    with optpoline.attach(target.pid, on_event=tell) as session:
        session.learn(LEARN_S)
        with pytest.raises(ValueError, match="4 of 4 sites"):
            session.promote()
        assert all(record.next_sample_s > 0.0 for record in session.records)
    assert target.finish().startswith("wrong 0 rounds")


def test_the_program_cannot_write_its_blocks(start_target: StartTarget) -> None:
    target = start_target("life", "spin", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        _check_sealed(target)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_many_sessions_in_a_row(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=RETPOLINE)
    before = Witness.of(target.pid)
    for number in range(10):
        target.ask(str(number))
        with optpoline.attach(target.pid) as session:
            session.learn(0.05)
            assert session.promote() > 0
        before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def _fail_in_session(pid: int, where: str) -> None:
    """Raise an error somewhere in a session."""
    with optpoline.attach(pid) as session:
        if where != "attached":
            session.learn(0.05)
        if where == "promoted":
            session.promote()
        raise ZeroDivisionError


@pytest.mark.parametrize("where", ["attached", "learning", "promoted"])
def test_an_error_inside_restores(start_target: StartTarget, where: str) -> None:
    target = start_target("promote", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with pytest.raises(ZeroDivisionError):
        _fail_in_session(target.pid, where)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


CROSSING = {"over_line_1", "over_line_3"}
"""Functions whose site's displacement lies in two cache lines."""


def _promoted_functions(session: optpoline.Session) -> set[str]:
    """Return the functions with a promoted site whose text leads to its block."""
    return {
        (record.site.function or "?")
        for record in session.records
        if record.state is SiteState.PROMOTED and record.home is not None
    }


def test_sites_across_lines_and_pages(start_target: StartTarget) -> None:
    target = start_target("crossing", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        assert _promoted_functions(session) >= {"in_one_line", "plain", *CROSSING}
        (over_page,) = (s for s in session.summary().sites if "over_page" in (s.function or ""))
        assert over_page.refusal == Refusal.PAGE_CROSSING.value
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize(
    ("call", "may_wake"), [("sleep", False), ("receive", True), ("gather", False)]
)
def test_sleepers_and_sites_across_lines(
    start_target: StartTarget, call: str, *, may_wake: bool
) -> None:
    """Who waits for anything waits again; who has a part of what it waits for is not woken."""
    target = start_target("crossing", flags=RETPOLINE)
    target.ask(call)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        promoted = _promoted_functions(session)
        assert promoted >= {"in_one_line", "plain"}
        assert promoted & CROSSING == (CROSSING if may_wake else set())
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    target.ask("wake")
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("threads", ["alone", "several"])
def test_naps_under_a_filter_begin_again(start_target: StartTarget, threads: str) -> None:
    """The way back into an interrupted one is a system call that the filter kills."""
    target = start_target("confined_naps", threads, flags=RETPOLINE)
    before = Witness.of(target.pid)
    for _ in range(3):
        with optpoline.attach(target.pid) as session:
            session.learn(0.1)
            session.promote()
            session.watch(0.1)
            assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"


def test_asleep_only_when_letting_go(start_target: StartTarget) -> None:
    target = start_target("crossing", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        assert _promoted_functions(session) >= CROSSING
        target.ask("sleep")
        stops = session.target.stops
        n_stops = stops.n_stops
        assert session.detach().outcome is DetachOutcome.INCOMPLETE
        # One for the others: those two are tried many times, but none of that stops a thread.
        assert stops.n_stops == n_stops + 1
    # Only those two are not back; they lead to blocks that lead to their thunk.
    sites = [r.site for r in session.records if r.site.function in CROSSING]
    changed = before.changed_bytes(target.pid).keys()
    assert changed <= {a for site in sites for a in range(site.disp_addr, site.disp_addr + 4)}
    assert changed
    assert optpoline.restore(target.pid).outcome is DetachOutcome.INCOMPLETE
    target.ask("wake")
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
