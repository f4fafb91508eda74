# SPDX-License-Identifier: Apache-2.0
"""Static keys and calls of running programs: there and back, and nothing in between."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import pytest

import optpoline
from optpoline.cli.main import main
from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps
from optpoline.process.stop import Wake, stop_threads
from tests.live.conftest import LiveTarget
from tests.live.documented import OF_DECLARED, read_examples, run_example
from tests.live.witness import Witness

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"
SOURCES = ("main.c", "other.c")

C = ("gcc", "-std=c11", "-x", "c")
OUT_OF_LINE = "-DOPTPOLINE_OUT_OF_LINE"

PLAIN = "31 64 6 0 105"
"""What the program computes: branches, calls, a tail call, events, another unit."""


@dataclass(frozen=True)
class Case:
    """Settings, and what the program computes then."""

    settings: dict[str, str]
    expected: str


CASES = (
    Case({"trace": "on"}, "3031 64 6 0 5"),
    Case({"checks": "off"}, "1 64 6 0 105"),
    Case({"trace": "on", "checks": "off"}, "3001 64 6 0 5"),
    Case({"codec": "codec_v2"}, "31 65 7 0 106"),
    Case({"codec": "codec_v1"}, PLAIN),
    Case({"hook": "on_event"}, "31 64 6 1 105"),
    Case({"hook": "on_event", "codec": "codec_v2", "trace": "on"}, "3031 65 7 1 6"),
)

N_LOOKS = 12

Build = Callable[..., Path]
Start = Callable[..., LiveTarget]


@pytest.fixture(scope="session")
def build(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Return a function that compiles sources of the declared project, once for each way."""
    directory = tmp_path_factory.mktemp("settings")
    done: dict[tuple[str, ...], Path] = {}

    def compile_once(*command: str, sources: tuple[str, ...] = SOURCES) -> Path:
        key = (*command, *sources)
        if key not in done:
            path = directory / f"program-{len(done)}"
            files = [str(PROJECT / source) for source in sources]
            whole = [*command, f"-I{INCLUDE}", *files, "-o", str(path)]
            subprocess.run(whole, check=True, capture_output=True)
            done[key] = path
        return done[key]

    return compile_once


@pytest.fixture
def start() -> Iterator[Start]:
    """Return a function that starts a program; it is killed at the end."""
    started: list[LiveTarget] = []

    def run(*command: str | Path) -> LiveTarget:
        started.append(LiveTarget([str(word) for word in command]))
        return started[-1]

    yield run
    for target in started:
        with target.process as process:
            process.kill()


@pytest.fixture
def target(build: Build, start: Start) -> LiveTarget:
    """Start the project, built as usual."""
    return start(build(*C, "-O2"), "serve")


def change(program: optpoline.DeclaredProgram, settings: dict[str, str]) -> None:
    """Make settings, in one transaction."""
    with program.transaction() as transaction:
        for name, value in settings.items():
            match value:
                case "on":
                    transaction.key(name).enable()
                case "off":
                    transaction.key(name).disable()
                case _:
                    transaction.static_call(name).update(value)


def test_settings_and_their_reset(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        for case in CASES:
            change(program, case.settings)
            assert target.ask("") == case.expected, case
            assert program.reset() == len(case.settings), case
            assert target.ask("") == PLAIN, case
            before.check(target.pid)


def test_documented_example_works(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    (example,) = [one for one in read_examples("docs/api.md") if OF_DECLARED in one]
    run_example(example, "docs/api.md", target.pid)
    assert target.ask("") == PLAIN
    with optpoline.declared(target.pid) as program:
        program.reset()
    before.check(target.pid)
    target.finish()


def test_inline_calls_skip_the_trampoline(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        call = program.static_call("codec")
        call.update("codec_v2")
        n_sites = call.summary.n_calls
        changed = before.changed_bytes(target.pid)
        starts = [addr for addr in changed if addr - 1 not in changed]
        assert n_sites >= 3
        assert len(starts) >= 1 + n_sites  # the trampoline; bytes that stay split a displacement
        call.reset()
    before.check(target.pid)


def test_only_the_trampoline_of_an_out_of_line_call_is_changed(build: Build, start: Start) -> None:
    target = start(build(*C, "-O2", OUT_OF_LINE), "serve")
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        program.static_call("codec").update("codec_v2")
        changed = before.changed_bytes(target.pid)
        assert max(changed) - min(changed) < 4


def test_counted(target: LiveTarget) -> None:
    with optpoline.declared(target.pid) as program:
        key = program.key("trace")
        for wanted in (1, 2):
            key.increment()
            assert (key.count, key.enabled) == (wanted, True)
        key.enable()
        assert key.count == 2
        key.decrement()
        assert target.ask("") == "3031 64 6 0 5"
        key.decrement()
        assert (key.count, key.enabled) == (0, False)
        assert target.ask("") == PLAIN
        with pytest.raises(optpoline.UsageError, match="trace is not enabled"):
            key.decrement()
        key.increment()
        key.increment()
        key.disable()
        assert key.count == 0


def test_what_is_set_stays_and_is_told(
    target: LiveTarget, capsys: pytest.CaptureFixture[str]
) -> None:
    pid = str(target.pid)
    before = Witness.of(target.pid)
    listed = optpoline.find_sites(target.pid).declared
    assert main(["key", pid, "trace=on"]) == 0
    assert main(["static-call", pid, "codec=codec_v2"]) == 0
    assert target.ask("") == "3031 65 7 0 6"
    capsys.readouterr()
    assert main(["status", pid]) == 0
    assert "set: trace=on, codec=codec_v2" in capsys.readouterr().out
    report = optpoline.audit(target.pid)
    assert report.is_sound
    assert report.foreign_changes == ()
    assert report.settings == ("trace=on", "codec=codec_v2")
    with optpoline.declared(target.pid) as program:
        assert [key.name for key in program.keys if key.is_set] == ["trace"]
    assert optpoline.find_sites(target.pid).declared == listed
    assert main(["detach", pid]) == 0
    assert "set, and left so: trace=on, codec=codec_v2" in capsys.readouterr().err
    assert target.ask("") == "3031 65 7 0 6"
    assert main(["detach", pid, "--settings"]) == 0
    before.check(target.pid)
    assert optpoline.read_status(target.pid) is None


def test_wrong_names_and_functions_change_nothing(target: LiveTarget) -> None:
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        for settings, said in (
            ({"trace": "on", "nothing": "on"}, "no static key nothing: it has checks, trace"),
            ({"trace": "on", "other": "f"}, "no static call other: it has codec, hook, local"),
            (
                {"trace": "on", "codec": "on_event"},
                "no declared target of the static call codec .* may be codec_v1, codec_v2",
            ),
        ):
            with pytest.raises(optpoline.UsageError, match=said):
                change(program, settings)
        before.check(target.pid)
        with pytest.raises(optpoline.UsageError, match=r"no module .* has a function nowhere"):
            program.static_call("codec").update("nowhere", any_function=True)
        program.static_call("codec").update("local_codec", any_function=True)
        assert target.ask("") == "31 93 35 0 134"
        assert program.static_call("codec").target == "local_codec"
    left = optpoline.read_status(target.pid)
    assert left is not None
    assert left.settings == ("codec=local_codec",)


@pytest.mark.parametrize("timeout_s", [-1.0, float("nan")])
def test_a_timeout_that_is_none(target: LiveTarget, timeout_s: float) -> None:
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        transaction = program.transaction(timeout_s=timeout_s)
        transaction.key("trace").enable()
        with pytest.raises(optpoline.UsageError, match="timeout_s is"):
            transaction.commit()
    before.check(target.pid)


def test_another_controller_that_has_stopped_it_is_waited_for(target: LiveTarget) -> None:
    is_stopped = threading.Event()

    def hold() -> None:
        with (
            RemoteMemory(target.pid) as memory,
            stop_threads(target.pid, memory=memory, wake=Wake.ALL),
        ):
            is_stopped.set()
            time.sleep(0.1)

    other = threading.Thread(target=hold)
    other.start()
    assert is_stopped.wait(10.0)
    with optpoline.declared(target.pid) as program:
        program.key("trace").enable()
    other.join()
    assert target.ask("") == "3031 64 6 0 5"


def test_a_breakpoint_in_one_site_keeps_all_from_being_changed(target: LiveTarget) -> None:
    with optpoline.declared(target.pid) as program, RemoteMemory(target.pid) as memory:
        declared = optpoline.find_sites(target.pid).declared
        branch = next(one for one in declared if (one.kind.value, one.name) == ("branch", "checks"))
        original = memory.read(branch.address, 1)
        memory.write(branch.address, b"\xcc")
        before = Witness.of(target.pid)
        with pytest.raises(optpoline.SiteChanged):
            change(program, {"trace": "on", "checks": "off", "codec": "codec_v2"})
        before.check(target.pid)
        memory.write(branch.address, original)
        change(program, {"trace": "on", "checks": "off", "codec": "codec_v2"})
    assert target.ask("") == "3001 65 7 0 6"


RECORD_SIZE, KEY_KIND, NAME_OFF = 36, 1, 16
OWNER = b"optpoline\0\0\0"


def damage(raw: bytes, how: str) -> bytes:
    """Return a file of the declared project with its notes changed."""
    program = bytearray(raw)
    starts = [found.end() for found in re.finditer(OWNER + b"\1", raw)]
    records = [start - 1 for start in starts]
    keys = [record for record in records if raw[record + 1] == KEY_KIND]
    assert len(keys) == 2
    match how:
        case "newer":
            program[records[0]] = 99
        case "damaged":
            program[records[0] + 1] = 99
        case "cut off":
            size_at = records[0] - len(OWNER) - 8
            assert program[size_at] == RECORD_SIZE
            program[size_at + 2] = 0xFF
        case "two of one name":
            first, second = (key + NAME_OFF for key in keys)
            name = first + struct.unpack_from("<i", raw, first)[0]
            struct.pack_into("<i", program, second, name - second)
    return bytes(program)


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("newer", "of version 99, newer than 1; use the release of optpoline whose optpoline.h"),
        ("damaged", "is of the unknown kind 99: .* are damaged; build it again"),
        ("cut off", "is cut off: .* are damaged; build it again"),
        ("two of one name", "two static keys with the name .*; give one of them another name"),
    ],
)
def test_damaged_notes_leave_the_program_untouched(
    build: Build,
    start: Start,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    how: str,
    said: str,
) -> None:
    damaged = tmp_path / "program"
    damaged.write_bytes(damage(build(*C, "-O2").read_bytes(), how))
    damaged.chmod(0o755)
    target = start(damaged, "serve")
    before, pid = Witness.of(target.pid), str(target.pid)
    with pytest.raises(optpoline.NotesError, match=f"{damaged}.*{said}"):
        optpoline.declared(target.pid)
    with pytest.raises(optpoline.NotesError, match=said):
        optpoline.restore(target.pid, settings=True)
    for command in (
        ["key", pid],
        ["key", pid, "trace=on"],
        ["static-call", pid, "codec=codec_v2"],
        ["detach", pid, "--settings"],
        ["sites", str(damaged)],
    ):
        assert main(command) == 6
        assert re.search(said, capsys.readouterr().err.replace("\n  ", "; "))
    # There is nothing else to list; why not is told.
    assert main(["sites", pid]) == 3
    assert re.search(f"note: .*{said}", capsys.readouterr().err)
    before.check(target.pid)
    assert target.ask("") == PLAIN
    assert optpoline.read_status(target.pid) is None


@pytest.mark.parametrize(
    ("command", "said"),
    [
        (["key", "trace=on", "nothing=on"], "no static key nothing: it has checks, trace"),
        (["key", "trace=maybe"], "maybe is no state of the static key trace"),
        (["static-call", "nothing=codec_v2"], "no static call nothing: it has codec, hook"),
        (["static-call", "hook=on_event", "codec=nowhere"], "nowhere is no declared target"),
        (["static-call", "codec=on_event"], "on_event is no declared target of the static call"),
        (["static-call", "codec=nowhere", "--any-function"], "has a function nowhere"),
    ],
)
def test_commands_with_wrong_names(
    target: LiveTarget, capsys: pytest.CaptureFixture[str], command: list[str], said: str
) -> None:
    before = Witness.of(target.pid)
    assert main([command[0], str(target.pid), *command[1:]]) == 2
    assert said in capsys.readouterr().err
    before.check(target.pid)


def test_a_program_that_a_signal_has_stopped_in_any_call(build: Build, start: Start) -> None:
    target = start(build(*C, "-O2", sources=("waits.c",)), "stopped")
    target.wait_for_state("T")
    with optpoline.declared(target.pid) as program:
        program.key("trace").enable()
    target.wait_for_state("T")
    os.kill(target.pid, signal.SIGCONT)
    assert target.ask("") == "101"


def test_a_program_that_a_signal_has_stopped(target: LiveTarget) -> None:
    os.kill(target.pid, signal.SIGSTOP)
    target.wait_for_state("T")
    with optpoline.declared(target.pid) as program:
        change(program, {"trace": "on"})
    target.wait_for_state("T")
    os.kill(target.pid, signal.SIGCONT)
    assert target.ask("") == "3031 64 6 0 5"


@pytest.mark.parametrize("call", ["select", "ppoll", "epoll_pwait", "masked"])
def test_a_program_that_waits(build: Build, start: Start, call: str) -> None:
    target = start(build(*C, "-O2", sources=("waits.c",)), call)
    target.wait_for_state("S")
    with optpoline.declared(target.pid) as program:
        transaction = program.transaction(timeout_s=0.3)
        transaction.key("trace").enable()
        if call == "masked":
            with pytest.raises(optpoline.TransactionTimeout, match="must not be interrupted"):
                transaction.commit()
            assert target.ask("") == "1"
        else:
            transaction.commit()
            # It has not noticed: one line, one event.
            assert target.ask("") == "101"


# --- several modules


def test_one_name_is_one_key_in_all_modules(build: Build, start: Start) -> None:
    compilers = ((*C, "-O2"), ("clang", *C[1:], "-Os"))
    libraries = [build(*compiler, "-fPIC", "-shared") for compiler in compilers]
    target = start(build("gcc", "-Wl,--no-as-needed", *map(str, libraries), sources=("user.c",)))
    for library in libraries:
        library.unlink()
    before = Witness.of(target.pid)
    modules = {str(library) for library in libraries}
    with optpoline.declared(target.pid) as program:
        assert target.ask("") == "95"
        change(program, {"trace": "on", "codec": "codec_v2"})
        assert target.ask("") == "3096"
        assert {frozenset(one.modules) for one in program.keys} == {frozenset(modules)}
        changed = before.changed_bytes(target.pid)
        for library in libraries:
            text = [m for m in read_maps(target.pid) if m.is_executable and str(library) in m.path]
            assert any(m.start <= addr < m.end for m in text for addr in changed)
        program.reset()
    before.check(target.pid)


def test_modules_that_come_and_go(build: Build, start: Start) -> None:
    library = build(*C, "-O1", "-fPIC", "-shared")
    target = start(build("gcc", "-pthread", sources=("loader.c",)), library)
    with optpoline.declared(target.pid) as program:
        for _ in range(N_LOOKS):
            # It may be there or not; it is neither damaged nor somebody else's.
            if "trace" in {key.name for key in program.keys}:
                with suppress(optpoline.UsageError):  # gone by now
                    change(program, {"trace": "on", "codec": "codec_v2"})
            for call in program.static_calls:
                assert not call.is_torn
    assert target.ask("") == "ran 0"


# --- any function

SOURCES_OF_NAMES = {
    "a.c": r"""
#include <stdio.h>
#include "optpoline.h"
__attribute__((noipa)) int first(int value) { return value; }
DEFINE_STATIC_CALL(codec, first);
static int chosen(int value) { return value + 1; }
static int (*choose(void))(int) { return chosen; }
int indirect(int value) __attribute__((ifunc("choose")));
__attribute__((noipa, used)) static int same(int value) { return value + 2; }
int main(void)
{
    int (*volatile call)(int) = indirect;
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF) {
        printf("%d\n", static_call(codec)(call(0)));
        fflush(stdout);
    }
    return 0;
}
""",
    "b.c": "__attribute__((noipa, used)) static int same(int value) { return value + 3; }\n",
}


def test_a_name_that_is_no_one_function(start: Start, tmp_path: Path) -> None:
    for name, source in SOURCES_OF_NAMES.items():
        (tmp_path / name).write_text(source)
    path, files = tmp_path / "program", [str(tmp_path / name) for name in SOURCES_OF_NAMES]
    command = ["gcc", "-O2", f"-I{INCLUDE}", *files, "-o", str(path)]
    subprocess.run(command, check=True, capture_output=True)
    target = start(path)
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        call = program.static_call("codec")
        with pytest.raises(optpoline.UsageError, match="has several functions same"):
            call.update("same", any_function=True)
        with pytest.raises(optpoline.UsageError, match=r"indirect of .* is no function, but choo"):
            call.update("indirect", any_function=True)
        before.check(target.pid)
        call.update("chosen", any_function=True)
    assert target.ask("") == "2"


# --- sessions


def test_settings_outlive_a_session(build: Build, start: Start) -> None:
    target = start(build(*C, "-O2", "-mindirect-branch=thunk", "-fcf-protection=none"), "serve")
    with optpoline.attach(target.pid) as session:
        session.key("trace").enable()
        with session.transaction() as transaction:
            transaction.static_call("codec").update("codec_v2")
            transaction.key("checks").disable()
        session.learn(0.05)
        assert target.ask("") == "3001 65 7 0 6"
        with optpoline.declared(target.pid) as other:
            assert other.key("trace").enabled
            other.key("checks").enable()
        key = session.key("checks")
    with pytest.raises(optpoline.OptpolineError, match="is over"):
        key.disable()
    assert target.ask("") == "3031 65 7 0 6"
    with optpoline.attach(target.pid) as session:
        assert session.notes == []
        assert session.key("trace").enabled
        assert session.static_call("codec").target == "codec_v2"
    assert target.ask("") == "3031 65 7 0 6"


def test_what_is_over_says_so(target: LiveTarget) -> None:
    with optpoline.declared(target.pid) as program:
        key, call = program.key("trace"), program.static_call("codec")
    before = Witness.of(target.pid)
    for use in (key.enable, call.reset, lambda: key.enabled, lambda: program.static_calls):
        with pytest.raises(optpoline.OptpolineError, match=r"process \d+ declares is over"):
            use()
    before.check(target.pid)


# --- transactions


def parse(answer: str) -> dict[str, int]:
    """Take an answer of transactions.c apart."""
    return {name: int(value) for name, value in (word.split("=") for word in answer.split())}


N_TRANSACTIONS = 20
NUMBERS = range(10, 20)


def test_threads_never_see_both_sides(build: Build, start: Start) -> None:
    target = start(build(*C, "-O2", "-pthread", sources=("transactions.c",)))
    with optpoline.declared(target.pid) as program:
        for generation in range(1, N_TRANSACTIONS + 1):
            with program.transaction(timeout_s=30.0) as transaction:
                for n in NUMBERS:
                    call = transaction.static_call(f"call{n}")
                    call.update(f"generation{generation % 8}")
                    key = transaction.key(f"key{n}")
                    (key.enable if generation >> n % 3 & 1 else key.disable)()
            # They have gone by before the next, or nothing is seen.
            while parse(target.ask(""))["newest"] < generation:
                pass
    counts = parse(target.ask(""))
    assert counts["newest"] == N_TRANSACTIONS
    assert counts["least"] > 0
    assert (counts["order"], counts["view"]) == (0, 0)


def test_readers_are_waited_for(build: Build, start: Start) -> None:
    target = start(build(*C, "-O2", "-pthread", sources=("transactions.c",)))
    target.ask("hold")
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        transaction = program.transaction(timeout_s=0.05)
        transaction.key("key10").enable()
        with pytest.raises(optpoline.TransactionTimeout, match="between optpoline_read_begin") as e:
            transaction.commit()
        assert e.value.tids
        before.check(target.pid)
        target.ask("go")
        program.key("key10").enable()
        assert program.key("key10").enabled


# --- a controller that is killed

SETTINGS = {"trace": "on", "checks": "off", "codec": "codec_v2", "hook": "on_event"}


Die = Callable[[int, int, dict[str, str]], None]


@pytest.fixture
def die_at(monkeypatch: pytest.MonkeyPatch) -> Die:
    """Return a function that makes settings in a child, which is killed before its n-th store."""

    def run(pid: int, n_left: int, settings: dict[str, str]) -> None:
        child = os.fork()
        if child:
            _, status = os.waitpid(child, 0)
            assert os.waitstatus_to_exitcode(status) == -signal.SIGKILL
            return
        write = RemoteMemory.write

        def counted(self: RemoteMemory, addr: int, data: bytes) -> None:
            nonlocal n_left
            if not n_left:
                os.kill(os.getpid(), signal.SIGKILL)
            n_left -= 1
            write(self, addr, data)

        try:
            monkeypatch.setattr(RemoteMemory, "write", counted)
            with optpoline.declared(pid) as program:
                change(program, settings)
        finally:
            os._exit(1)

    return run


def torn_names(program: optpoline.DeclaredProgram) -> list[str]:
    """Return what was left half done."""
    keys = [one.name for one in program.keys if one.is_torn]
    return keys + [one.name for one in program.static_calls if one.is_torn]


@pytest.mark.parametrize(
    ("point", "torn"),
    [(0, []), (1, ["checks"]), (3, ["checks", "trace"]), (4, ["checks", "trace"]), (11, [])],
)
def test_killed_between_two_stores(
    target: LiveTarget, die_at: Die, point: int, torn: list[str]
) -> None:
    before = Witness.of(target.pid)
    die_at(target.pid, point, SETTINGS)
    assert target.ask("")  # it goes on
    report = optpoline.audit(target.pid)
    assert report.foreign_changes == ()
    assert len(report.faults) == len(torn)
    with optpoline.declared(target.pid) as program:
        assert torn_names(program) == torn
        result = optpoline.restore(target.pid)
        assert result.outcome is optpoline.DetachOutcome.CLEAN
        assert torn_names(program) == []
        assert optpoline.audit(target.pid).is_sound
        if point >= len(SETTINGS):  # counts and trampolines come first: all of it is known
            assert target.ask("") == "3001 65 7 1 6"
        change(program, SETTINGS)
        assert target.ask("") == "3001 65 7 1 6"
    optpoline.restore(target.pid, settings=True)
    before.check(target.pid)
    assert target.ask("") == PLAIN


def test_killed_between_a_trampoline_and_its_calls(target: LiveTarget, die_at: Die) -> None:
    before = Witness.of(target.pid)
    with optpoline.declared(target.pid) as program:
        change(program, {"codec": "codec_v2"})
        die_at(target.pid, 2, {"codec": "codec_v1"})
        assert torn_names(program) == ["codec"]
        assert program.static_call("codec").target is None
        assert program.finish() == 1
        assert program.static_call("codec").target == "codec_v1"
        assert target.ask("") == PLAIN
    optpoline.restore(target.pid, settings=True)
    before.check(target.pid)
