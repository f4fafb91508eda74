# SPDX-License-Identifier: Apache-2.0
"""Programs that are built, started or patched in unusual ways."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import optpoline
from optpoline.controller.summary import DetachOutcome, SiteState
from optpoline.model import Refusal, Site
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps
from tests.live.conftest import BuildTarget, LiveTarget, StartTarget
from tests.live.serving import learn_and_promote, promote, serve
from tests.live.uprobes import KIND_PATH, open_uprobe
from tests.live.witness import RETPOLINE, Witness, arena_mappings, run_json

pytestmark = pytest.mark.live

_TIMEOUT_S = 30.0
needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to make namespaces")

BUILDS = {
    "static": (*RETPOLINE, "-static", "-fno-pie", "-no-pie"),
    "static-pie": (*RETPOLINE, "-static-pie", "-fPIE"),
    "static-stripped": (*RETPOLINE, "-static-pie", "-fPIE", "-s"),
}
HUGE = (*RETPOLINE, "-Wl,-z,max-page-size=0x200000,-z,common-page-size=0x200000")
"""Text begins at a huge page, with nothing else in that."""


def _start_path(path: Path | str, *args: str) -> LiveTarget:
    """Start a program that no fixture built; the caller kills it."""
    return LiveTarget([str(path), *args])


@contextmanager
def _running(target: LiveTarget) -> Iterator[LiveTarget]:
    """Kill a program at the end if it still runs."""
    with target.process:
        try:
            yield target
        finally:
            target.process.kill()


# --- built


@pytest.mark.parametrize("build", list(BUILDS))
def test_static(start_target: StartTarget, build: str) -> None:
    target = start_target("confined", "free", flags=BUILDS[build])
    for _ in range(2):
        serve(target)
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_musl(tmp_path: Path, kind: str) -> None:
    """A static program without a signal handler has nothing to come back by: refused."""
    compiler = shutil.which("musl-gcc")
    if compiler is None:
        pytest.skip("musl-gcc is not installed")
    source = Path(__file__).parent.parent / "targets" / "promote.c"
    path = tmp_path / "promote"
    flags = [*RETPOLINE, *(["-static"] if kind == "static" else [])]
    subprocess.run([compiler, *flags, "-o", str(path), str(source)], check=True)
    with _running(_start_path(path, "1")) as target:
        if kind == "dynamic":
            serve(target)
        else:
            before = Witness.of(target.pid)
            error = run_json("attach", target.pid, status=6)["error"]
            assert "no rt_sigreturn trampoline" in error["message"]
            before.check(target.pid)
        assert target.finish().startswith("wrong 0 rounds")


# --- started


@needs_root
def test_in_other_namespaces(build_target: BuildTarget, tmp_path: Path) -> None:
    """A container seen from outside: its file is on a mount that we do not have."""
    path = build_target("confined", *RETPOLINE)
    where = tmp_path / "inside"
    where.mkdir()
    script = 'mount -t tmpfs tmpfs "$1" && cp "$0" "$1/inside" && exec "$1/inside" free'
    command = ["unshare", "--pid", "--mount", "--fork", "--kill-child"]
    command += ["sh", "-c", script, str(path), str(where)]
    with _running(LiveTarget(command)) as target:
        children = Path(f"/proc/{target.pid}/task/{target.pid}/children").read_text()
        target.pid = int(children)
        assert not (where / "inside").exists()
        serve(target)
        assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("how", ["deleted", "upgraded"])
def test_its_file_is_not_there_any_more(
    build_target: BuildTarget, tmp_path: Path, how: str
) -> None:
    path = tmp_path / "program"
    shutil.copy(build_target("confined", *RETPOLINE), path)
    with _running(_start_path(path, "free")) as target:
        if how == "deleted":
            path.unlink()
        else:
            # Another build of it, with its sites and symbols elsewhere.
            shutil.copy(build_target("promote", *RETPOLINE), tmp_path / "new")
            (tmp_path / "new").rename(path)
        assert any(m.path == f"{path} (deleted)" for m in read_maps(target.pid))
        serve(target)
        assert target.finish().startswith("wrong 0 rounds")


# --- text on huge pages


def _text_is_copied(target: LiveTarget) -> bool:
    """Tell whether executable memory outside of files is mapped."""
    return any(m.is_executable and not m.inode and not m.path for m in read_maps(target.pid))


def test_text_on_huge_pages(start_target: StartTarget) -> None:
    target = start_target("confined", "huge", flags=HUGE)
    assert _text_is_copied(target)
    for _ in range(2):
        with promote(target.pid) as session:
            (site,) = session.sites
            assert site.function == "work"
            with RemoteMemory(target.pid) as memory:
                assert memory.read(site.addr, len(site.code)) != site.code
            assert session.detach().outcome is DetachOutcome.CLEAN
        with RemoteMemory(target.pid) as memory:
            assert memory.read(site.addr, len(site.code)) == site.code
        assert arena_mappings(target.pid) == []
    assert target.finish().startswith("wrong 0 rounds")


@pytest.mark.parametrize("when", ["before learning", "promoted"])
def test_text_moves_to_huge_pages_during_a_session(start_target: StartTarget, when: str) -> None:
    """The program copies what we wrote, and the copy is what has to be undone."""
    target = start_target("confined", "free", flags=HUGE)
    config = optpoline.Config(maps_every_s=0.05)
    with optpoline.attach(target.pid, config=config) as session:
        (site,) = session.sites
        if when == "before learning":
            target.ask("huge")
        learn_and_promote(session)
        if when == "promoted":
            target.ask("huge")
        assert _text_is_copied(target)
        session.watch(0.3)
        assert session.detach().outcome is DetachOutcome.CLEAN
    with RemoteMemory(target.pid) as memory:
        assert memory.read(site.addr, len(site.code)) == site.code
    assert arena_mappings(target.pid) == []
    promote(target.pid).detach()
    assert target.finish().startswith("wrong 0 rounds")


# --- patched by others


def test_a_breakpoint_beside_sites(start_target: StartTarget) -> None:
    """Somebody's int3 in text that is not a site stays where it is."""
    target = start_target("life", "spin", flags=RETPOLINE)
    with optpoline.attach(target.pid) as session:
        # Behind the call, in a function that is never reached.
        (cold,) = (site for site in session.sites if site.function == "cold")
    with RemoteMemory(target.pid) as memory:
        memory.write(cold.end, b"\xcc")
    before = Witness.of(target.pid)
    with promote(target.pid) as session:
        (found,) = (s for s in session.summary().sites if s.address == cold.addr)
        assert found.state is SiteState.BASELINE
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


class _Uprobe:
    """A uprobe of ours on one process, which counts how often it is met."""

    def __init__(self, target: LiveTarget, addr: int) -> None:
        """Install it."""
        if not KIND_PATH.exists():
            pytest.skip("the kernel has no uprobe events")
        try:
            self._fd = open_uprobe(target.pid, addr)
        except OSError as error:
            pytest.skip(f"uprobe events are not permitted: {error.strerror}")
        with RemoteMemory(target.pid) as memory:
            assert memory.read(addr, 1) == b"\xcc"

    def count(self) -> int:
        """Return how often it was met."""
        return int.from_bytes(os.read(self._fd, 8), "little")

    def wait_for_more(self) -> None:
        """Wait until it is met again."""
        start, deadline = self.count(), time.monotonic() + _TIMEOUT_S
        while self.count() == start:
            assert time.monotonic() < deadline, "the uprobe is not met any more"
            time.sleep(0.001)

    def close(self) -> None:
        """Take it away."""
        os.close(self._fd)


def _sites_of(target: LiveTarget) -> tuple[Site, ...]:
    """Return the sites of a program."""
    with optpoline.attach(target.pid) as session:
        return session.sites


@pytest.mark.parametrize("place", ["site", "target"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_a_uprobe(start_target: StartTarget, place: str, when: str) -> None:
    """It is met as before; a site that has one is left alone; it can go at any time."""
    target = start_target("life", "spin", flags=RETPOLINE)
    pristine = Witness.of(target.pid)
    (tail,) = (site for site in _sites_of(target) if site.function == "tail")
    with promote(target.pid) as session:
        hot = next(t.address for s in session.summary().sites for t in s.targets if t.promoted)
    addr = tail.addr if place == "site" else int(hot)
    if when == "before":
        probe = _Uprobe(target, addr)
    with optpoline.attach(target.pid) as session:
        learn_and_promote(session)
        if when == "during":
            probe = _Uprobe(target, addr)
        probe.wait_for_more()
        session.watch(0.3)
        probe.wait_for_more()
        states = {s.address: s for s in session.summary().sites}
        if place == "site" and when == "before":
            assert states[int(tail.addr)].refusal == Refusal.FOREIGN_BYTES.value
        result = session.detach()
    probe.wait_for_more()
    if place == "site" and when == "during":
        # Under the int3 is a branch of ours, which its owner puts back as it goes.
        assert result.outcome is DetachOutcome.FOREIGN_BYTES
        assert result.foreign == (int(tail.addr),)
    else:
        assert result.outcome is DetachOutcome.CLEAN
    probe.close()
    if place == "site" and when == "during":
        optpoline.restore(target.pid)
    pristine.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


# --- restartable sequences


@pytest.mark.parametrize("flags", [RETPOLINE, (*RETPOLINE, "-s"), (*RETPOLINE, "-static")])
def test_sites_in_restartable_sequences(start_target: StartTarget, flags: tuple[str, ...]) -> None:
    target = start_target("sections", flags=flags)
    before = Witness.of(target.pid)
    with promote(target.pid) as session:
        states = {s.refusal: s.state for s in session.summary().sites}
        assert states == {
            None: SiteState.PROMOTED,
            Refusal.CRITICAL_SECTION.value: SiteState.REFUSED,
        }
        session.watch(0.1)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")


def test_a_thread_that_no_library_has_made(start_target: StartTarget) -> None:
    """It has no area for restartable sequences where the others have: blocks must not write there.

    It sleeps while the arena is made, so that it cannot be asked.
    """
    target = start_target("own_tls", flags=RETPOLINE)
    before = Witness.of(target.pid)
    with optpoline.attach(target.pid) as session:
        assert session.target.arenas[0].rows.rseq is None
        session.learn(0.1)
        assert session.promote() >= 1
        session.watch(0.05)
    before.check(target.pid)
    assert target.finish().startswith("wrong 0 rounds")
