# SPDX-License-Identifier: Apache-2.0
"""The sites of a process are listed whoever has linked them, and nothing is touched."""

from __future__ import annotations

import signal

import pytest

import optpoline
from optpoline.controller.audit import audit
from tests.live.conftest import LiveTarget, StartTarget
from tests.live.witness import RETPOLINE, Witness, run_cli, run_json

pytestmark = pytest.mark.live

LEARN_S = 0.2


def _sites(pid: int) -> dict[str, tuple[str, str, str]]:
    """Return what is listed: thunk, function and state by address."""
    sites = run_json("sites", pid)["sites"]
    return {site["address"]: (site["thunk"], site["function"], site["state"]) for site in sites}


def _in_state(sites: dict[str, tuple[str, str, str]], state: str) -> dict[str, tuple[str, ...]]:
    """Return sites as they would be listed in one state."""
    return {address: (*site[:2], state) for address, site in sites.items()}


@pytest.fixture
def target(start_target: StartTarget) -> LiveTarget:
    """Start a program of four sites, all of which are promoted."""
    return start_target("promote", "1", flags=RETPOLINE)


def test_while_a_controller_works(target: LiveTarget) -> None:
    plain = _sites(target.pid)
    assert len(plain) == 4
    assert plain == _in_state(plain, "baseline")
    learning: list[dict[str, tuple[str, str, str]]] = []

    def look(event: optpoline.Event) -> None:
        if event.kind is optpoline.EventKind.LEARNING:
            learning.append(_sites(target.pid))

    with optpoline.attach(target.pid, on_event=look) as session:
        session.learn(LEARN_S)
        assert learning == [_in_state(plain, "learning")]
        assert session.promote() == 4
        before = Witness.of(target.pid)
        assert _sites(target.pid) == _in_state(plain, "promoted")
        done = run_cli("sites", target.pid)
        assert done.stdout.count("yes, promoted") == 4
        assert "4 sites in 1 module, 4 promoted" in done.stderr
        assert "(still running)" in done.stderr
        before.check_text(target.pid)
        assert audit(target.pid).is_sound
    assert _sites(target.pid) == plain
    assert target.finish().startswith("wrong 0 rounds")


def test_of_what_was_left(target: LiveTarget) -> None:
    plain = _sites(target.pid)
    run_cli("attach", "--learn-seconds", LEARN_S, "--duration", 0.4, "--leave", target.pid)
    assert _sites(target.pid) == _in_state(plain, "promoted")
    assert "(gone)" in run_cli("sites", target.pid).stderr
    run_cli("detach", target.pid)
    assert _sites(target.pid) == plain
    assert target.finish().startswith("wrong 0 rounds")


def test_under_a_breakpoint(target: LiveTarget) -> None:
    """It hides the opcode of a linked site, which is a site all the same."""
    plain = _sites(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        session.promote()
        session.watch(0.0)
        record = session.records[0]
        target.process.send_signal(signal.SIGSTOP)
        target.wait_for_state("T")
        try:
            session.target.memory.write(record.site.addr, b"\xcc")
            sites = _sites(target.pid)
        finally:
            session.target.memory.write(record.site.addr, record.entry.code[:1])
            target.process.send_signal(signal.SIGCONT)
        assert sites.pop(hex(record.site.addr))[2] == "refused"
        plain.pop(hex(record.site.addr))
        assert sites == _in_state(plain, "promoted")
    assert target.finish().startswith("wrong 0 rounds")


def test_of_a_forked_child(start_target: StartTarget) -> None:
    target = start_target("life", "spin", "1", flags=RETPOLINE)
    plain = _sites(target.pid)
    with optpoline.attach(target.pid) as session:
        session.learn(LEARN_S)
        n_promoted = session.promote()
        child = int(target.ask("fork").split()[1])
        kept = _sites(target.pid)
    assert _sites(target.pid) == plain
    assert _sites(child) == kept
    assert [site[2] for site in kept.values()].count("promoted") == n_promoted > 0
    run_cli("detach", child)
    assert _sites(child) == plain
    assert target.ask("join").startswith("status 0 wrong 0 rounds")
    assert target.finish().startswith("wrong 0 rounds")
