# SPDX-License-Identifier: Apache-2.0
"""What notes tell is enough to change a program: there and back, in its file.

No controller here: the bytes that notes name are changed in a copy of the program, which is
then run. Keys are switched, static calls get other targets by either form.
"""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

from optpoline.discover.declarations import Declarations
from optpoline.discover.declared import read_declarations
from optpoline.discover.image import ModuleImage
from optpoline.discover.nearby import find_call_sites
from optpoline.model import Addr

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"
NOP = bytes.fromhex("0f1f440000")

BUILDS = {
    "c -O0": ("gcc", "-std=c11", "-x", "c", "-O0"),
    "c -O1": ("gcc", "-std=c11", "-x", "c", "-O1"),
    "c -O2 lto": ("gcc", "-std=c11", "-x", "c", "-O2", "-flto"),
    "c -O3": ("gcc", "-std=c11", "-x", "c", "-O3"),
    "c -Os": ("gcc", "-std=c11", "-x", "c", "-Os", "-fno-pie", "-no-pie"),
    "c++ -O0": ("g++", "-std=c++17", "-x", "c++", "-O0"),
    "c++ -O2": ("g++", "-std=c++17", "-x", "c++", "-O2"),
}


class Program:
    """A program whose file is changed at addresses that notes name.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        """Read what it declares."""
        self.image = ModuleImage.from_file(str(path))
        self.declared: Declarations = read_declarations(self.image)
        self.path = path
        self.original = path.read_bytes()

    def write(self, addr: Addr, data: bytes) -> None:
        """Change bytes."""
        segment = next(
            one for one in self.image.facts.segments if 0 <= addr - one.addr < one.file_size
        )
        with self.path.open("r+b") as stream:
            stream.seek(segment.file_off + addr - segment.addr)
            stream.write(data)

    def lead(self, end: Addr, target: Addr) -> None:
        """Change a displacement."""
        self.write(Addr(end - 4), (target - end).to_bytes(4, "little", signed=True))

    def switch(self, name: str, *, is_on: bool) -> None:
        """Switch a key."""
        key = next(key for key in self.declared.keys if key.name == name)
        for branch in self.declared.branches:
            if branch.key == key.addr:
                end = Addr(branch.addr + branch.size)
                if is_on == branch.is_inverted:
                    self.write(Addr(end - 5), NOP)
                else:
                    self.write(Addr(end - 5), b"\xe9")
                    self.lead(end, branch.target)

    def target(self, call: str, name: str) -> Addr:
        """Return a function that was declared for a static call."""
        trampoline = self.call(call)
        return next(
            one.addr for one in self.declared.targets if (one.call, one.name) == (trampoline, name)
        )

    def call(self, name: str) -> Addr:
        """Return a static call's trampoline."""
        return next(call.addr for call in self.declared.calls if call.name == name)

    def redirect(self, call: str, name: str) -> None:
        """Change the trampoline of a static call: the out-of-line form."""
        self.lead(Addr(self.call(call) + 5), self.target(call, name))

    def redirect_sites(self, call: str, name: str) -> None:
        """Change each call of a static call: the inline form."""
        for site in find_call_sites(self.image, self.declared):
            if site.call == self.call(call):
                self.lead(site.insn.end, self.target(call, name))

    def remove_sites(self, call: str) -> None:
        """Make a nop of each call of a static call that is none in tail position."""
        for site in find_call_sites(self.image, self.declared):
            if site.call == self.call(call) and self.image.read(site.insn.addr, 1) == b"\xe8":
                self.write(site.insn.addr, NOP)

    def restore(self) -> None:
        """Undo everything."""
        self.path.write_bytes(self.original)

    def run(self) -> str:
        """Run it and return what it computes: branches, calls, tail call, events, other unit."""
        done = subprocess.run([str(self.path), "say"], capture_output=True, text=True, check=True)
        return done.stdout.strip()


@dataclass(frozen=True)
class Case:
    """One change and what the program computes after it."""

    change: str
    arguments: tuple[str, ...]
    expected: str
    is_on: bool | None = None


PLAIN = "31 64 6 0 105"
CASES = (
    Case("switch", ("trace",), "3031 64 6 0 5", is_on=True),
    Case("switch", ("checks",), "1 64 6 0 105", is_on=False),
    Case("switch", ("trace",), PLAIN, is_on=False),
    Case("redirect", ("codec", "codec_v2"), "31 65 7 0 106"),
    Case("redirect_sites", ("codec", "codec_v2"), "31 65 7 0 106"),
    Case("redirect", ("hook", "on_event"), "31 64 6 1 105"),
    Case("redirect_sites", ("hook", "on_event"), "31 64 6 1 105"),
    Case("remove_sites", ("hook",), PLAIN),
)


@pytest.fixture(scope="module", params=BUILDS)
def program(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Program:
    """Build the program in each way, once."""
    path = tmp_path_factory.mktemp("forms") / "program"
    sources = (str(PROJECT / "main.c"), str(PROJECT / "other.c"))
    command = [*BUILDS[request.param], "-s", f"-I{INCLUDE}", *sources, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    return Program(path)


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case.change} {case.arguments}")
def test_there_and_back(program: Program, case: Case) -> None:
    assert program.run() == PLAIN
    match case.change:
        case "switch":
            assert case.is_on is not None
            program.switch(*case.arguments, is_on=case.is_on)
        case "redirect":
            program.redirect(*case.arguments)
        case "redirect_sites":
            program.redirect_sites(*case.arguments)
        case "remove_sites":
            program.remove_sites(*case.arguments)
    try:
        # What was changed is still what the notes say.
        read_declarations(ModuleImage.from_file(str(program.path)))
        assert program.run() == case.expected
    finally:
        program.restore()
    assert program.run() == PLAIN
