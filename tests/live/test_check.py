# SPDX-License-Identifier: Apache-2.0
"""The audit: finds nothing at a sound program in any state, and each thing that is broken."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.audit_report import AuditReport, FaultKind, ForeignKind
from optpoline.controller.records import SiteRecord
from optpoline.controller.summary import DetachOutcome
from optpoline.model import Addr, tree_targets
from optpoline.patch.arena import Arena
from optpoline.patch.blocks import add_block, point_back, redirect
from optpoline.patch.layout import (
    BLOCK_ENTRY_SIZE,
    ENTRY_SIZE,
    HEADER_SIZE,
    ArenaHeader,
    BlockEntry,
)
from optpoline.process.memory import RemoteMemory
from optpoline.x86.assembler import encode_disp32
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.serving import promoted_sites
from tests.live.witness import (
    VARIANTS,
    Witness,
    run_cli,
    run_json,
    start_cli,
    wait_for_line,
)

pytestmark = pytest.mark.live

LEARN_S = 0.1
PIE = VARIANTS["pie"]
N_AUDITS = 30
"""Audits of a program while blocks come and go."""


def check_sound(pid: int, *, patched: bool) -> AuditReport:
    """Audit; nothing may be found, by anybody."""
    report = audit(pid)
    assert report.faults == ()
    assert report.foreign_changes == ()
    assert report.modules >= 2
    assert (report.promoted > 0) == patched
    return report


# --- sound


@pytest.mark.parametrize("variant", list(VARIANTS))
def test_sound_in_every_state(start_target: StartTarget, variant: str) -> None:
    target = start_target("promote", "2", flags=VARIANTS[variant])
    target.ask("3")
    before = Witness.of(target.pid)
    assert check_sound(target.pid, patched=False).arenas == 0
    with optpoline.attach(target.pid) as session:
        check_sound(target.pid, patched=False)
        session.learn(LEARN_S)
        learning = check_sound(target.pid, patched=True)
        assert learning.controller_alive
        assert learning.controller_pid == os.getpid()
        assert learning.blocks >= learning.promoted
        session.promote()
        check_sound(target.pid, patched=True)
        target.ask("2")
        session.watch(0.5)
        check_sound(target.pid, patched=True)
        assert session.detach(leave=True).outcome is DetachOutcome.LEFT
    left = check_sound(target.pid, patched=True)
    assert not left.controller_alive
    assert optpoline.restore(target.pid).outcome is DetachOutcome.CLEAN
    assert check_sound(target.pid, patched=False).arenas == 0
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


AUDIT_OFTEN = """
import sys
from optpoline.controller.audit import audit
print("ready", flush=True)
for _ in range(int(sys.argv[2])):
    report = audit(int(sys.argv[1]))
    print(report.faults, report.foreign_changes, flush=True)
"""


def test_sound_while_a_controller_works(start_target: StartTarget) -> None:
    """Audits in a row while blocks are made, redirected, retired, freed and used again."""
    target = start_target("promote", "1", flags=PIE)
    command = [sys.executable, "-c", AUDIT_OFTEN, str(target.pid), str(N_AUDITS)]
    n_freed = 0
    # Stopped by a signal, nobody is in a block: it can be freed without a grace period.
    with (
        broken(target) as session,
        subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as auditor,
    ):
        assert auditor.stdout is not None
        assert auditor.stdout.readline() == "ready\n"
        while auditor.poll() is None:
            for record in promoted_sites(session):
                home = record.home
                assert home is not None
                block = add_block(record.arena, home.plan, site_addr=record.site.addr)
                redirect(home, block.addr)
                time.sleep(0.001)
                point_back(home)
                record.arena.retire_block(block.addr)
                time.sleep(0.001)
                record.arena.free_block(block.addr)
                n_freed += 1
        lines = auditor.stdout.readlines()
    assert lines == ["() ()\n"] * N_AUDITS
    assert n_freed > N_AUDITS


def test_sound_after_a_kill(start_target: StartTarget) -> None:
    target = start_target("promote", "2", flags=PIE)
    for line in ("learning ", "promoted "):
        controller = start_cli("attach", target.pid, "--learn-seconds", "0.3", "--duration", "60")
        with controller:
            wait_for_line(controller, line)
            controller.kill()
        report = check_sound(target.pid, patched=True)
        assert not report.controller_alive
        assert report.controller_pid == controller.pid
        run_cli("detach", target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_library_that_is_gone(start_target: StartTarget) -> None:
    """Sites and targets of an unloaded module are no fault."""
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        record = hottest(session)
        arena = record.arena
        # As a journal says after dlclose: a site where nothing is mapped.
        gone = replace(record.entry, addr=Addr(0x1000))
        count_addr = Addr(arena.addr + ArenaHeader.N_ENTRIES_OFF)
        n_entries = arena.load_u64(count_addr)
        write(arena, arena.addr + HEADER_SIZE + n_entries * ENTRY_SIZE, gone.pack())
        arena.store_u64(count_addr, n_entries + 1)
        report = audit(target.pid)
        arena.store_u64(count_addr, n_entries)
    assert report.faults == ()
    assert report.gone == 1


# --- broken


def hottest(session: optpoline.Session) -> SiteRecord:
    """Return a promoted site that compares with a literal."""
    return next(r for r in promoted_sites(session) if r.site.kind.value == "call")


def write(arena: Arena, addr: int, data: bytes) -> bytes:
    """Write to an arena by whole words; return what was there."""
    start, end = addr & ~7, addr + len(data) + 7 & ~7
    before = arena.read(Addr(start), end - start)
    after = before[: addr - start] + data + before[addr - start + len(data) :]
    for off in range(0, len(after), 8):
        arena.store_u64(Addr(start + off), int.from_bytes(after[off : off + 8], "little"))
    return before[addr - start : addr - start + len(data)]


@contextmanager
def broken(target: LiveTarget) -> Iterator[optpoline.Session]:
    """Promote a program and stop it by a signal while it is broken on purpose.

    Whoever breaks something mends it before the program goes on, and checks that.
    """
    target.ask("3")
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        assert session.promote() > 0
        os.kill(target.pid, signal.SIGSTOP)
        target.wait_for_state("T")
        try:
            yield session
            assert audit(target.pid).faults == ()
        finally:
            os.kill(target.pid, signal.SIGCONT)
        assert session.detach().outcome is DetachOutcome.CLEAN
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def faults_with(pid: int, arena: Arena, addr: int, data: bytes) -> tuple[list[FaultKind], str]:
    """Write to an arena, audit, take it back; return what was found, and in which words."""
    before = write(arena, addr, data)
    try:
        report = audit(pid)
    finally:
        write(arena, addr, before)
    return [f.kind for f in report.faults], " ".join(f.sentence for f in report.faults)


def text_with(pid: int, addr: int, data: bytes) -> AuditReport:
    """Write to text, audit, take it back; return what was found."""
    with RemoteMemory(pid) as memory:
        before = memory.read(addr, len(data))
        memory.write(addr, data)
        try:
            return audit(pid)
        finally:
            memory.write(addr, before)


def test_sites_that_lead_elsewhere(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        one, other = promoted_sites(session)[:2]
        assert one.home is not None
        assert other.home is not None
        entry = one.entry
        wrong = (
            other.home.addr,  # another site's block
            one.home.addr + 16,  # the middle of its own
            entry.addr & ~0xFFF,  # no block at all
        )
        for dst in wrong:
            report = text_with(target.pid, entry.disp_addr, encode_disp32(entry.end, dst))
            assert [(f.kind, f.address) for f in report.faults] == [(FaultKind.SITE, entry.addr)]
            assert f"{dst:#x}" in report.faults[0].sentence
            assert report.foreign_changes == ()
        for off in range(4):
            now = one.branch[off] ^ 0x10
            report = text_with(target.pid, entry.disp_addr + off, bytes([now]))
            assert [f.kind for f in report.faults] == [FaultKind.SITE]


def test_another_patcher_in_a_site(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        record = hottest(session)
        assert record.home is not None
        entry = record.entry
        report = text_with(target.pid, entry.addr, b"\xcc")
        assert report.faults == ()
        (change,) = report.foreign_changes
        assert (change.kind, change.address) == (ForeignKind.SITE, entry.addr)
        # Below it, it would lead into nothing: that is ours.
        wrong = b"\xcc" + encode_disp32(entry.end, record.home.addr + 16)
        report = text_with(target.pid, entry.addr, wrong)
        assert [f.kind for f in report.faults] == [FaultKind.SITE]
        assert [c.kind for c in report.foreign_changes] == [ForeignKind.SITE]


def test_text_outside_sites(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        record = promoted_sites(session)[0]
        assert record.home is not None
        entry = record.entry
        end = int(entry.end)
        report = text_with(target.pid, end, b"\xcc")
        (change,) = report.foreign_changes
        assert (change.kind, change.address, change.size) == (ForeignKind.INT3, end, 1)
        assert change.module == record.site.module
        with RemoteMemory(target.pid) as memory:
            data = bytes(byte ^ 0xFF for byte in memory.read(end, 6))
        (change,) = text_with(target.pid, end, data).foreign_changes
        assert (change.kind, change.address, change.size) == (ForeignKind.OTHER, end, 6)
        assert text_with(target.pid, end, data).faults == ()
        # A branch into an arena that no journal tells of.
        call = b"\xe8" + encode_disp32(end + 5, record.home.addr)
        report = text_with(target.pid, end, call)
        assert [f.kind for f in report.faults] == [FaultKind.TEXT]


def test_blocks(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        for record in promoted_sites(session):
            block = record.home
            assert block is not None
            last = block.addr + block.size
            for addr in (block.addr + 9, block.addr + block.size // 2, last - 3):
                byte = record.arena.read(Addr(addr), 1)[0]
                kinds, _ = faults_with(target.pid, record.arena, addr, bytes([byte ^ 4]))
                assert kinds == [FaultKind.BLOCK]
            # jmp *%rax for the jump to the thunk
            kinds, words = faults_with(target.pid, record.arena, last - 6, b"\xff\xe0")
            assert kinds == [FaultKind.BLOCK]
            assert "indirect branch" in words
            assert f"{block.addr:#x}" in words


def test_heads(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        one, other = promoted_sites(session)[:2]
        assert one.home is not None
        assert one.learner is not None
        assert other.home is not None
        head = one.arena.head_of(one.home.addr)
        try:
            # To its thunk and to its other block: as a controller does.
            for good in (one.thunk_addr, one.learner.addr):
                redirect(one.home, good)
                assert audit(target.pid).faults == ()
            for wrong in (other.home.addr, Addr(one.learner.addr + 16), one.site.addr):
                redirect(one.home, wrong)
                assert [f.kind for f in audit(target.pid).faults] == [FaultKind.HEAD]
        finally:
            write(one.arena, one.home.addr, head)
        kinds, _ = faults_with(target.pid, one.arena, one.home.addr, b"\xcc")
        assert kinds == [FaultKind.HEAD]


def test_literals(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        arena = hottest(session).arena
        first = arena.addr + arena.geometry.literal_off
        words = {arena.load_u64(Addr(first + 8 * i)): first + 8 * i for i in range(64)}
        row_literal = words[arena.rows.shared_addr + arena.rows.row_size]
        home = hottest(session).home
        assert home is not None
        target_literal = words[next(tree_targets(home.plan.tree))]
        for addr, said in (
            (target_literal, "may not point"),
            (row_literal, "outside the counters"),
        ):
            value = arena.load_u64(Addr(addr))
            kinds, found = faults_with(target.pid, arena, addr, bytes([value & 0xFF ^ 1]))
            assert set(kinds) == {FaultKind.LITERAL}, found
            assert said in found


def test_descriptors(start_target: StartTarget) -> None:
    """What the kernel is told of a counting block must be true."""
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        learner = hottest(session).learner
        assert learner is not None
        arena = learner.arena
        (entry,) = (block for block in arena.blocks if block.addr == learner.addr)
        assert entry.text_size < entry.size
        at = -(-(entry.addr + entry.text_size) // 32) * 32
        # Version, start, size and abort address of the first.
        for off in (0, 8, 16, 24):
            byte = arena.read(Addr(at + off), 1)[0]
            kinds, words = faults_with(target.pid, arena, at + off, bytes([byte ^ 2]))
            assert kinds == [FaultKind.BLOCK]
            assert "descriptor" in words
        size_addr = arena.addr + arena.geometry.block_off + BlockEntry.STATE_OFF + 4
        first = arena.read(Addr(size_addr), 4)
        for wrong in (0, 1, 1 << 24):
            value = (int.from_bytes(first, "little") + wrong) % (1 << 32)
            found = faults_with(target.pid, arena, size_addr, value.to_bytes(4, "little"))
            assert bool(found[0]) == bool(wrong)


def test_the_block_table(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        arena = hottest(session).arena
        at = arena.addr + arena.geometry.block_off
        # State, crc, site, size and address of the first entry.
        kinds, words = faults_with(target.pid, arena, at + BlockEntry.STATE_OFF + 1, b"\x09")
        assert FaultKind.TABLE in kinds
        assert "damaged" in words
        crc = arena.read(Addr(at + 12), 1)[0]
        kinds, _ = faults_with(target.pid, arena, at + 12, bytes([crc ^ 1]))
        assert kinds == [FaultKind.BLOCK]
        kinds, words = faults_with(target.pid, arena, at + 16, b"\1\2\3\4")
        assert FaultKind.TABLE in kinds
        assert "no journal" in words
        second = arena.read(Addr(at + BLOCK_ENTRY_SIZE), 8)
        kinds, words = faults_with(target.pid, arena, at, second)
        assert FaultKind.TABLE in kinds
        assert "overlap" in words


def test_free_memory(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        arena = hottest(session).arena
        places = [entry.end for entry in arena.blocks if entry.end % 16]
        # Between blocks, behind the last, and far behind.
        for addr in (places[0], arena.used_code_end + 64, arena.used_code_end + (1 << 20)):
            kinds, words = faults_with(target.pid, arena, addr, b"\x90")
            assert kinds == [FaultKind.FREE_MEMORY]
            assert f"{addr:#x}" in words
            assert faults_with(target.pid, arena, addr, b"\xcc")[0] == []


def test_an_arena_that_cannot_be_read(start_target: StartTarget) -> None:
    target = start_target("promote", flags=PIE)
    with broken(target) as session:
        arena = hottest(session).arena
        kinds, _ = faults_with(target.pid, arena, arena.addr, b"x")
        assert FaultKind.ARENA in kinds


# --- the command line


def test_command_line(start_target: StartTarget, tmp_path: Path) -> None:
    target = start_target("promote", flags=PIE)
    assert "nothing of optpoline" in run_cli("check", target.pid).stdout
    run_cli("attach", target.pid, "--learn-seconds", "0.2", "--duration", "0.1", "--leave")
    assert "all is well" in run_cli("check", target.pid).stdout
    document = run_json("check", target.pid)
    assert document["sound"] is True
    assert document["promoted"] > 0
    addr = int(optpoline_sites(target.pid)[0], 16)
    os.kill(target.pid, signal.SIGSTOP)
    target.wait_for_state("T")
    with RemoteMemory(target.pid) as memory:
        disp = memory.read(addr + 1, 1)
        memory.write(addr + 1, bytes([disp[0] ^ 0x10]))
        words = run_cli("check", target.pid, "--json", tmp_path / "report", status=7).stdout
        document = run_json("check", target.pid, status=7)
        memory.write(addr + 1, disp)
        # Somebody's breakpoint alone is no fault.
        byte = memory.read(addr, 1)
        memory.write(addr, b"\xcc")
        foreign = run_cli("check", target.pid).stdout
        memory.write(addr, byte)
    os.kill(target.pid, signal.SIGCONT)
    assert "1 fault found" in words
    assert (tmp_path / "report").exists()
    assert [fault["kind"] for fault in document["faults"]] == ["site"]
    assert document["faults"][0]["address"] == hex(addr)
    assert "1 foreign change" in foreign
    run_cli("detach", target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def optpoline_sites(pid: int) -> list[str]:
    """Return the addresses of patched sites."""
    sites = run_json("status", pid)["left_behind"]["sites"]
    return [site["address"] for site in sites if site["state"] == "patched"]


def test_a_process_that_is_not_there() -> None:
    assert run_json("check", 1 << 22, status=4)["error"]["kind"] == "target_gone"
