# SPDX-License-Identifier: Apache-2.0
"""A table of what a key or static call can be used for, changed there and back in every build.

Built as the kernel's selftests are: a row says what a function computes as the keys and calls
are set. All rows are checked, everything is changed, all rows are checked, and so on, until all
is as it was. Each build has both forms of static calls: the unit ``base.c`` is out-of-line.
"""

from __future__ import annotations

import subprocess
from collections.abc import Callable, Iterator, Mapping
from itertools import product
from pathlib import Path

import pytest

import optpoline
from optpoline.process.memory import RemoteMemory
from tests.live.conftest import LiveTarget
from tests.live.witness import Witness

pytestmark = pytest.mark.live

ROOT = Path(__file__).parents[2]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"

OUT_OF_LINE = "-DOPTPOLINE_OUT_OF_LINE"
LTO = ("-flto",)
LLD = ("-fuse-ld=lld",)

GCC = {"c": ("gcc", "-std=c11", "-x", "c"), "c++": ("g++", "-std=c++17", "-x", "c++")}
CLANG = {"c": ("clang", "-std=c11", "-x", "c"), "c++": ("clang++", "-std=c++17", "-x", "c++")}
LEVELS = ("-O0", "-O1", "-O2", "-O3", "-Os")
KINDS = (
    (),
    ("-fno-pie", "-no-pie", OUT_OF_LINE),
    ("-fPIC",),
    (OUT_OF_LINE,),
    ("-fno-pie", "-no-pie"),
)
"""What the levels take turns in, another one first for each compiler and language."""


def list_builds() -> Iterator[tuple[str, ...]]:
    """Yield the whole matrix: each compiler, language and level, without and with LTO."""
    languages = [*GCC.values(), *CLANG.values()]
    for n, (lto, language, level) in enumerate(product(((), LTO), languages, LEVELS)):
        linker = LLD if lto and language in CLANG.values() else ()
        yield (*language, level, *lto, *linker, *KINDS[(n + n // len(LEVELS)) % len(KINDS)])


BUILDS = {" ".join(command): command for command in list_builds()}


Setting = bool | str
Settings = Mapping[str, Setting]

STATES: dict[str, tuple[Setting, Setting]] = {
    "off": (False, True),
    "on": (True, False),
    "base_off": (False, True),
    "base_on": (True, False),
    "codec": ("plus1", "plus2"),
    "base_codec": ("plus1", "plus2"),
    "letter": ("tolower", "toupper"),
    "hook": ("NULL", "set_to_1"),
    "size": ("0", "huge"),
    "name": ("0", "text"),
    "many": ("sum8", "last8"),
    "turn": ("up", "around"),
    "curve": ("half", "squared"),
    "fold": ("add_all", "first_of"),
    "risky": ("no_throw", "thrower"),
}
"""What each begins as, and what it is changed to. The last is declared in C++ alone."""

FIRST: Settings = {name: states[0] for name, states in STATES.items()}
OTHER: Settings = {name: states[1] for name, states in STATES.items()}

STEPS: tuple[Settings, ...] = (
    OTHER,
    # With these no two keys are changed in the same steps, nor calls of one type.
    {**FIRST, "off": True, "base_on": False, "codec": "times10", "hook": "set_to_1"},
    {**FIRST, "off": True, "base_off": True, "base_codec": "plus2", "size": "huge"},
)

LEAST_CALLS = {"codec": 7, "hook": 3, "size": 2}
"""How many calls the source has, where it has more than one; loops may be unrolled."""

CODECS: dict[object, Callable[[int], int]] = {
    "plus1": lambda value: value + 1,
    "plus2": lambda value: value + 2,
    "times10": lambda value: value * 10,
}


def of_keys(is_set: Settings) -> Iterator[tuple[str, int]]:
    """Yield what the rows on keys compute."""
    off, on, base_off, base_on = (is_set[key] for key in ("off", "on", "base_off", "base_on"))
    for key in ("off", "on", "base_off", "base_on"):
        for way in ("likely", "unlikely", "enabled"):
            yield f"{key}_{way}", int(is_set[key])
    yield "sides", (20 if off else 7) * (1 if on else -1)
    yield "both", int(off and on)
    yield "either", int(off or on)
    yield "loop", 777 if off else 12
    yield "twice", -23 if base_off else 23
    codec = CODECS[is_set["base_codec"]]
    yield "in_base", codec(10) + (100 if base_off else 0) + (1000 if base_on else 0)


def of_calls(is_set: Settings) -> Iterator[tuple[str, int]]:
    """Yield what the rows on static calls compute."""
    codec, base_codec = CODECS[is_set["codec"]], CODECS[is_set["base_codec"]]
    yield "value", codec(2) + 100
    yield "nested", codec(codec(2)) + 1
    yield "called_tail", codec(5)
    yield "called_maybe_tail", codec(2) * 100 - 1
    yield "pointer", codec(2)
    yield "called_in_loop", (codec(0) * 100 + codec(1)) * 100 + codec(2)
    yield "base_value", base_codec(2) + 100
    yield "called_base_tail", base_codec(5)
    yield "bracketed", codec(2) * 10 + int(is_set["on"])
    yield "outside", ord("M" if is_set["letter"] == "toupper" else "m")
    is_hooked = is_set["hook"] == "set_to_1"
    yield "hooked", 11 if is_hooked else 56
    yield "hooked_by_key", 1 if is_hooked and is_set["off"] else 5
    yield "sized", -(1 << 40) if is_set["size"] == "huge" else 0
    yield "sized_tail", -(1 << 2) if is_set["size"] == "huge" else 0
    yield "named", ord("x") if is_set["name"] == "text" else -1
    yield "of_stack", 8 if is_set["many"] == "last8" else 36
    yield "of_memory", 312 if is_set["turn"] == "around" else 234
    yield "of_vector", 900 if is_set["curve"] == "squared" else 150
    yield "of_variable", 2 if is_set["fold"] == "first_of" else 9
    if "risky" in is_set:
        yield "thrown", 42_102 if is_set["risky"] == "thrower" else 3003
        yield "scoped", 102 + (1 if is_set["off"] else 0) + (10 if is_set["on"] else 0)


@pytest.fixture
def target(build: str, tmp_path: Path) -> Iterator[LiveTarget]:
    """Build the program in one way, and start it."""
    path = tmp_path / "there_and_back"
    sources = [str(PROJECT / name) for name in ("there_and_back.c", "base.c")]
    flags = ["-s", "-pedantic", "-Wall", "-Wextra", f"-I{INCLUDE}"]
    command = [*BUILDS[build], *flags, *sources, "-o", str(path)]
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    said = [line for line in done.stderr.splitlines() if "lto-wrapper" not in line]
    assert (done.returncode, said) == (0, [])
    started = LiveTarget([str(path)])
    yield started
    with started.process as process:
        process.kill()


def read_counts(pid: int) -> list[bytes]:
    """Return every key's count, and the bytes behind it."""
    with RemoteMemory(pid) as memory:
        declared = optpoline.find_sites(pid).declared
        return [memory.read(one.address, 8) for one in declared if one.kind.value == "key"]


def check_rows(target: LiveTarget, now: Settings) -> None:
    """Check what every row computes."""
    said = (pair.partition("=") for pair in target.ask("").split())
    computed = {name: int(value) for name, _, value in said}
    assert computed == {**dict(of_keys(now)), **dict(of_calls(now))}


def check_all(target: LiveTarget, program: optpoline.DeclaredProgram, now: Settings) -> None:
    """Check what every row computes, and what is told of every key and call."""
    check_rows(target, now)
    told = {key.name: key.state.value == "on" for key in program.keys}
    assert told | {call.name: call.target for call in program.static_calls} == now


def change(program: optpoline.DeclaredProgram, settings: Settings) -> None:
    """Make settings, in one transaction."""
    with program.transaction() as transaction:
        for name, value in settings.items():
            match value:
                case True:
                    transaction.key(name).enable()
                case False:
                    transaction.key(name).disable()
                case str():
                    transaction.static_call(name).update(value)


@pytest.mark.parametrize("build", BUILDS)
def test_there_and_back(target: LiveTarget, build: str) -> None:
    command = BUILDS[build]
    declared = STATES.keys() - (set() if "c++" in command else {"risky"})
    before, counts = Witness.of(target.pid), read_counts(target.pid)
    assert len(counts) == 4
    first = {name: FIRST[name] for name in declared}
    check_rows(target, first)
    with optpoline.declared(target.pid) as program:
        for step in STEPS:
            now = {name: step[name] for name in declared}
            change(program, now)
            check_all(target, program, now)
        for call in program.static_calls:
            assert call.is_out_of_line == (OUT_OF_LINE in command or call.name == "base_codec")
            assert call.is_out_of_line or call.n_calls >= LEAST_CALLS.get(call.name, 1)
        # Given its first function again a call leads there directly; now to its trampoline.
        program.reset()
        check_all(target, program, first)
    before.check(target.pid)
    assert read_counts(target.pid) == counts
    target.finish()
