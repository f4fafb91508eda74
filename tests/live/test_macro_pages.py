# SPDX-License-Identifier: Apache-2.0
"""What the pages of the header's macros show: their programs run, and are compiled to that."""

from __future__ import annotations

import contextlib
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import optpoline
from optpoline.model import Addr
from optpoline.process.memory import RemoteMemory
from optpoline.x86.decode import decode_one
from tests.live.macro_pages import Insn, Page, Program, disassemble, list_changed
from tests.live.serving import learn_and_promote
from tests.live.witness import Witness

_COMPILER = subprocess.run(["gcc", "-dumpversion"], capture_output=True, text=True, check=True)

pytestmark = [
    pytest.mark.live,
    pytest.mark.skipif(_COMPILER.stdout.strip() != "12", reason="the pages show GCC 12's code"),
]

RETPOLINE = ("-mindirect-branch=thunk", "-fcf-protection=none")
ROUNDS = "2000000"

Start = Callable[..., Program]


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Return a function that builds and starts a page's program; it is killed at the end."""
    started: list[Program] = []

    def run(page: Page, *flags: str) -> Program:
        path = tmp_path / "program"
        page.build(path, *flags)
        started.append(Program(path))
        return started[-1]

    yield run
    for program in started:
        with program.process as process:
            process.kill()


@contextlib.contextmanager
def busy(program: Program) -> Iterator[None]:
    """Keep the program at work while a block runs."""
    is_over = threading.Event()

    def work() -> None:
        while not is_over.is_set():
            program.ask(ROUNDS)

    with ThreadPoolExecutor(max_workers=1) as pool:
        working = pool.submit(work)
        try:
            yield
        finally:
            is_over.set()
        working.result()


def find_goals(addr: int, code: bytes, insns: Sequence[Insn]) -> list[int]:
    """Return where direct branches of a function lead; ``insns`` tell where each begins."""
    goals: list[int] = []
    off = 0
    for insn in insns:
        decoded = decode_one(code[off : off + insn.size], Addr(addr + off))
        if decoded is not None and decoded.target is not None:
            goals.append(decoded.target)
        off += insn.size
    return goals


def test_dynamic_call(start: Start, tmp_path: Path) -> None:
    page, scratch = Page.read("dynamic-call.md"), tmp_path / "code"
    program = start(page, *RETPOLINE)
    assert program.ask("10") == "73"
    before = Witness.of(program.pid)
    _, code = program.read_function("apply")
    as_built, changed, block = page.listings
    assert disassemble(code, scratch) == as_built
    with optpoline.attach(program.pid) as session:
        with busy(program):
            learn_and_promote(session)
        assert program.ask("10") == "73"
        _, now = program.read_function("apply")
        assert list_changed(code, now, as_built, scratch) == changed
        (record,) = session.records
        assert record.active is not None
        with RemoteMemory(program.pid) as memory:
            made = memory.read(record.active.addr, record.active.size)
        assert disassemble(made, scratch) == block
    before.check(program.pid)


def test_static_call(start: Start, tmp_path: Path) -> None:
    page, scratch = Page.read("static-call.md"), tmp_path / "code"
    program = start(page)
    assert program.ask("7") == "8"
    before = Witness.of(program.pid)
    names = ("encode", "optpoline.call.codec")
    codes = [program.read_function(name)[1] for name in names]
    assert [disassemble(code, scratch) for code in codes] == [*page.listings[:2]]
    with optpoline.declared(program.pid) as declared:
        declared.static_call("codec").update("doubled")
        assert program.ask("7") == "15"
        doubled, _ = program.read_function("doubled")
        for name, code, as_built, changed in zip(
            names, codes, page.listings[:2], page.listings[2:], strict=True
        ):
            addr, now = program.read_function(name)
            assert list_changed(code, now, as_built, scratch) == changed
            assert find_goals(addr, now, as_built) == [doubled]
        declared.reset()
    before.check(program.pid)


def test_static_key(start: Start, tmp_path: Path) -> None:
    page, scratch = Page.read("static-key.md"), tmp_path / "code"
    program = start(page)
    assert program.ask("7") == "14"
    before = Witness.of(program.pid)
    _, code = program.read_function("step")
    as_built, changed, *_ = page.listings
    assert disassemble(code, scratch) == as_built
    with optpoline.declared(program.pid) as declared:
        declared.key("trace").enable()
        assert (program.ask("7"), program.hear()) == ("step 7", "14")
        addr, now = program.read_function("step")
        assert list_changed(code, now, as_built, scratch) == changed
        # To the eighth line, as the page says.
        assert find_goals(addr, now, as_built)[0] == addr + sum(one.size for one in as_built[:7])
        declared.reset()
    before.check(program.pid)
