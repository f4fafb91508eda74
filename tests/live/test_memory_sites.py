# SPDX-License-Identifier: Apache-2.0
"""Plain branches whose target is in memory: loaded by their blocks, else sites like any other."""

from __future__ import annotations

import pytest

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.summary import SiteState
from optpoline.model import Addr, Site
from optpoline.process.memory import RemoteMemory
from optpoline.x86.decode import Flow, decode_one
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.killed import check_left_by_kill
from tests.live.witness import Witness
from tests.unit.toolchain.conftest import build_plugin_once

pytestmark = pytest.mark.live

LEARN_S = 0.1
PLAIN = optpoline.Config(promote_plain=True)
CODE_FLAGS = {"pie": ("-fPIE", "-pie"), "no-pie": ("-fno-pie", "-no-pie")}
FORMS = {
    "by_base": "0x10(%rbx)",
    "by_tail": "0x10(%rax)",
    "by_index": ",8)",
    "by_global": "(%rip)",
    "by_thread": "%fs:",
    "by_stack": "(%rsp)",
    "by_stack_index": "(%rsp,%rax,8)",
    "by_goto": ",8)",
}


def _start(start_target: StartTarget, code: str) -> LiveTarget:
    """Start the program with a call through memory of each form."""
    plugin = f"-fplugin={build_plugin_once()}"
    flags = ("-O2", "-pthread", *CODE_FLAGS[code], plugin)
    return start_target("through_memory", flags=flags)


def _flow_at(pid: int, site: Site) -> Flow:
    """Return what the instruction at a site does now; it is as long as ever."""
    size = len(site.code)
    with RemoteMemory(pid) as memory:
        insn = decode_one(memory.read(site.addr, size), Addr(site.addr))
    assert insn is not None
    assert insn.size == size
    return insn.flow


@pytest.mark.parametrize("code", CODE_FLAGS)
def test_there_and_back(start_target: StartTarget, code: str) -> None:
    target = _start(start_target, code)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid, config=PLAIN) as session:
        sites = session.sites
        for function, form in FORMS.items():
            own = [site for site in sites if site.function == function]
            # The compiler has loaded some targets of the gotos itself.
            (loaded,) = (site for site in own if site.load is not None)
            assert form in str(loaded.thunk.symbol)
        baseline = {_flow_at(target.pid, site) for site in sites}
        assert baseline == {Flow.INDIRECT_CALL, Flow.INDIRECT_JUMP}
        session.learn(LEARN_S)
        assert {_flow_at(target.pid, site) for site in sites} == {Flow.CALL, Flow.JUMP}
        assert audit(target.pid).is_sound
        n_promoted = session.promote()
        while n_promoted < len(sites):
            session.learn(LEARN_S)
            n_promoted += session.promote()
        assert audit(target.pid).is_sound
        # Fewer targets, then all again: misses, windows, and blocks that are made anew.
        for phase in (1, 0, 3):
            target.ask(str(phase))
            session.watch(0.05)
        assert audit(target.pid).is_sound
        assert {site.state for site in session.summary().sites} == {SiteState.PROMOTED}
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"


def test_what_a_killed_controller_left(start_target: StartTarget) -> None:
    target = _start(start_target, "pie")
    before = Witness.of(target.pid)
    check_left_by_kill(target.pid)
    optpoline.restore(target.pid)
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"


def test_switched_off_to_be_changed(start_target: StartTarget) -> None:
    target = _start(start_target, "pie")
    before = Witness.of(target.pid)
    config = optpoline.Config(promote_plain=True, change="switch-off", poll_s=0.01)
    with optpoline.attach(target.pid, config=config) as session:
        session.learn(LEARN_S)
        session.promote()
        for phase in (1, 2, 0):
            target.ask(str(phase))
            session.watch(0.1)
        assert audit(target.pid).is_sound
    before.check(target.pid)
    assert target.finish() == "wrong 0\n"
