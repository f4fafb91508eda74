# SPDX-License-Identifier: Apache-2.0
"""Plain indirect branches that the compiler plugin has marked are sites like any other."""

from __future__ import annotations

import os
import signal
import time

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.events import EventKind
from optpoline.controller.summary import SiteState
from optpoline.model import Addr, Refusal, SiteKind
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import list_tids, read_state_char
from optpoline.x86.decode import Flow, decode_one
from tests.live.conftest import TARGETS, LiveTarget, StartTarget
from tests.live.killed import check_left_by_kill
from tests.live.uprobes import ENOTSUPP, open_uprobe
from tests.live.witness import (
    RETPOLINE,
    Witness,
    arena_mappings,
)
from tests.unit.toolchain.conftest import build_plugin_once

pytestmark = pytest.mark.live

LEARN_S = 0.1
PLAIN = optpoline.Config(promote_plain=True)
N_SITES = 6
INCLUDE = TARGETS.parents[1] / "src" / "optpoline" / "share" / "include"


@pytest.fixture
def target(start_target: StartTarget) -> LiveTarget:
    """Start a program whose plain call, tail call and four computed gotos take registers."""
    plugin = f"-fplugin={build_plugin_once()}"
    return start_target("promote", "1", flags=("-O2", "-pthread", plugin))


def _flow_at(pid: int, addr: int) -> Flow:
    """Return what the instruction at a site does now."""
    with RemoteMemory(pid) as memory:
        insn = decode_one(memory.read(addr, 5), Addr(addr))
    assert insn is not None
    assert insn.size == 5
    return insn.flow


def _promote_all(session: optpoline.Session, n_sites: int) -> None:
    """Learn until that many sites have run, on however busy a machine, and are promoted."""
    n_promoted = session.promote()
    while n_promoted < n_sites:
        session.learn(LEARN_S)
        n_promoted += session.promote()
    assert n_promoted == n_sites


def test_there_and_back(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid, config=PLAIN) as session:
        kinds = {site.addr: site.kind for site in session.sites}
        assert sorted(kind.value for kind in kinds.values()) == ["call", *["jump"] * (N_SITES - 1)]
        assert all(site.is_plain and len(site.code) == 5 for site in session.sites)
        session.learn(LEARN_S)
        direct = {SiteKind.CALL: Flow.CALL, SiteKind.JUMP: Flow.JUMP}
        for addr, kind in kinds.items():
            assert _flow_at(target.pid, addr) is direct[kind]
        _promote_all(session, N_SITES)
        changed = before.changed_bytes(target.pid)
        assert all(any(0 <= addr - site < 5 for site in kinds) for addr in changed)
        # Others than were learned come by the site's thunk, and are learned in their turn.
        for phase in (1, 2, 3, 4):
            target.ask(str(phase))
            session.watch(0.05)
        assert audit(target.pid).is_sound
        assert all(site.refusal is None for site in session.summary().sites)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_left_alone_unless_asked_for(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    events: list[optpoline.Event] = []
    with optpoline.attach(target.pid, on_event=events.append) as session:
        session.learn(LEARN_S)
        counted = session.drain()
        assert session.promote() == 0
        before.check_text(target.pid)
        assert {site.addr for site in session.sites} >= counted.keys() > set()
        (said,) = (event.message for event in events if event.kind is EventKind.NOT_PROMOTED)
        assert "--promote-plain" in said
    assert target.finish().startswith("wrong 0 rounds")


def test_what_a_killed_controller_left(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    left = check_left_by_kill(target.pid)
    assert {site.thunk[:2] for site in left.sites} == {"*%"}
    _list_with_breakpoints(target, left)
    optpoline.restore(target.pid)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def _list_with_breakpoints(target: LiveTarget, left: optpoline.SiteReport) -> None:
    """List the sites while a breakpoint hides the opcode of each that is linked."""
    linked = [site.address for site in left.sites if site.state is not SiteState.BASELINE]
    os.kill(target.pid, signal.SIGSTOP)
    for tid in list_tids(target.pid):
        while read_state_char(target.pid, tid) != "T":
            time.sleep(0.001)
    with RemoteMemory(target.pid) as memory:
        opcodes = {addr: memory.read(addr, 1) for addr in linked}
        for addr in linked:
            memory.write(addr, b"\xcc")
        hidden = {site.address: site for site in optpoline.find_sites(target.pid).sites}
        for addr, opcode in opcodes.items():
            memory.write(addr, opcode)
    os.kill(target.pid, signal.SIGCONT)
    assert hidden.keys() == {site.address for site in left.sites}
    foreign = {addr for addr, site in hidden.items() if site.refusal == Refusal.FOREIGN_BYTES.value}
    assert foreign == set(linked)


def test_no_uprobe_comes_to_a_plain_site(target: LiveTarget) -> None:
    # Taken away, it would leave the first byte of the baseline over an opcode of ours.
    with optpoline.attach(target.pid, config=PLAIN) as session:
        session.learn(LEARN_S)
        _promote_all(session, N_SITES)
        for kind in (SiteKind.CALL, SiteKind.JUMP):
            addr = next(site.addr for site in session.sites if site.kind is kind)
            with pytest.raises(OSError, match=f"{ENOTSUPP}"):
                open_uprobe(target.pid, addr)
    assert target.finish().startswith("wrong 0 rounds")


def test_nothing_changes_while_a_thread_must_not_be_woken(start_target: StartTarget) -> None:
    target = _start_dynamic(start_target)
    before = Witness.of(target.pid)
    target.ask("sleep")
    events: list[optpoline.Event] = []
    with optpoline.attach(target.pid, on_event=events.append) as session:
        session.learn(LEARN_S)
        assert session.promote() == 0
        before.check_text(target.pid)
        (said,) = (event.message for event in events if event.kind is EventKind.NOT_PROMOTED)
        assert "2 sites can be changed only while all threads stand" in said
        target.ask("wake")
        session.learn(LEARN_S)
        _promote_all(session, 2)
    before.check_text(target.pid)
    assert arena_mappings(target.pid) == []
    assert target.finish() == "wrong 0\n"


def _start_dynamic(start_target: StartTarget, *flags: str) -> LiveTarget:
    """Start a program with two dynamic calls of the header, which the plugin has marked too."""
    plugin = f"-fplugin={build_plugin_once()}"
    return start_target("dynamic", flags=("-O2", *flags, plugin, f"-I{INCLUDE}"))


@pytest.mark.parametrize("flags", [(), RETPOLINE], ids=["plain", "retpoline"])
def test_dynamic_calls(start_target: StartTarget, flags: tuple[str, ...]) -> None:
    target = _start_dynamic(start_target, *flags)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        _promote_all(session, 2)
        assert audit(target.pid).is_sound
        sites = {site.function: site for site in session.summary().sites if site.function}
        for name in ("first", "second"):
            (site,) = (site for function, site in sites.items() if function.startswith(name))
            assert site.state is SiteState.PROMOTED
            assert len(site.targets) == 4
            assert sum(target.promoted for target in site.targets) == 2
        quiet = [site for function, site in sites.items() if function.startswith("quiet")]
        # It is not padded, so it is a site only where it leads to a thunk.
        assert len(quiet) == bool(flags)
        assert all(site.refusal == Refusal.EXCLUDED.value for site in quiet)
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"
