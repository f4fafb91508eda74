# SPDX-License-Identifier: Apache-2.0
"""The scripts that stand alone: they know what the package knows."""

from __future__ import annotations

import ast
import importlib.util
import os
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest

import optpoline
from optpoline.model import Addr
from optpoline.patch import layout

SHARE = Path(optpoline.__file__).parent / "share"


def _load(name: str) -> ModuleType:
    """Load one script as a module."""
    spec = importlib.util.spec_from_file_location(name, SHARE / f"{name.replace('_', '-')}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


gdb_script = _load("optpoline_gdb")
perf_script = _load("optpoline_perf")

BASE = 0x5555_0000_0000


def _arena() -> tuple[bytes, layout.ArenaHeader]:
    """Return the first parts of an arena with three blocks, the second of them free."""
    header = layout.ArenaHeader(
        size=0x8000,
        block_off=0x2000,
        code_off=0x3000,
        literal_off=0x5000,
        counter_off=0x6000,
        controller_pid=1,
        controller_start=2,
        target_pid=3,
        n_entries=0,
        row_shift=12,
        n_cpus=1,
        n_blocks=3,
    )
    blocks = [
        layout.BlockEntry(
            addr=Addr(BASE + 0x3000 + 0x40 * number),
            size=0x1A + number,
            text_size=0x1A,
            crc=5,
            site_addr=Addr(0x1000 + number),
            head=bytes(8),
            kind=kind,
            state=state,
        ).pack()
        for number, (kind, state) in enumerate(
            [
                (layout.BlockKind.COUNTING, layout.BlockState.LIVE),
                (layout.BlockKind.PROMOTED, layout.BlockState.FREE),
                (layout.BlockKind.PROMOTED, layout.BlockState.RETIRED),
            ]
        )
    ]
    return header.pack().ljust(header.block_off, b"\0") + b"".join(blocks), header


def _reader(memory: bytes) -> Callable[[int, int], bytes]:
    """Return a function that reads memory mapped at ``BASE``."""

    def read(addr: int, size: int) -> bytes:
        data = memory[addr - BASE : addr - BASE + size]
        assert len(data) == size
        return data

    return read


def test_the_format_is_the_package_s() -> None:
    assert gdb_script.VERSION == layout.VERSION
    assert gdb_script.MAGIC == layout.MAGIC
    assert layout.ARENA_PATH.startswith(gdb_script.ARENA_NAME)
    assert perf_script.ARENA_PATH.decode() == layout.ARENA_PATH
    assert {kind.value: kind.name.lower() for kind in layout.BlockKind} == gdb_script.KINDS
    assert gdb_script.LIVE == layout.BlockState.LIVE
    assert gdb_script.RETIRED == layout.BlockState.RETIRED


@pytest.mark.parametrize("path", sorted(SHARE.glob("*.py")), ids=lambda path: path.name)
def test_they_stand_alone(path: Path) -> None:
    imported = [
        name.split(".")[0]
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
    ]
    assert set(imported) <= {*sys.stdlib_module_names, "gdb"}


def _names(node: ast.Import) -> list[str]:
    """Return what a statement imports."""
    return [alias.name for alias in node.names]


def test_the_header_is_read_as_it_is_written() -> None:
    memory, header = _arena()
    arena = gdb_script.read_arena(BASE, _reader(memory))
    assert arena == gdb_script.Arena(
        table=BASE + header.block_off,
        n_blocks=3,
        code_start=BASE + header.code_off,
        code_end=BASE + header.literal_off,
    )


@pytest.mark.parametrize("at", [0, 8])
def test_another_version_is_not_read(at: int) -> None:
    memory = bytearray(_arena()[0])
    memory[at] += 1
    assert gdb_script.read_arena(BASE, _reader(bytes(memory))) is None


@pytest.mark.parametrize(
    ("off", "expected"),
    [
        (0x3000, (0x3000, 0x1A, 0x1000, "counting", False)),
        (0x3019, (0x3000, 0x1A, 0x1000, "counting", False)),
        (0x301A, None),
        (0x3040, None),
        (0x3080, (0x3080, 0x1C, 0x1002, "promoted", True)),
        (0x2000, None),
        (0x5000, None),
    ],
)
def test_blocks_are_found(off: int, expected: tuple[int, int, int, str, bool] | None) -> None:
    read = _reader(_arena()[0])
    arena = gdb_script.read_arena(BASE, read)
    block = gdb_script.find_block(arena, BASE + off, read)
    if expected is None:
        assert block is None
    else:
        start, *others = expected
        assert block == gdb_script.Block(BASE + start, *others)


@pytest.mark.parametrize(
    ("code", "end", "is_call"),
    [
        ("e8 00 00 00 00", 5, True),
        ("2e e8 00 00 00 00", 6, True),
        ("e9 00 00 00 00", 5, False),
        ("2e e9 00 00 00 00", 6, False),
        ("0f 84 00 00 00 00", 6, False),
        ("2e 0f 8f 00 00 00 00", 7, False),
        ("2e 2e 2e ff d0", 5, True),
        ("2e 2e 41 ff e7", 5, False),
    ],
)
def test_sites_are_decoded(code: str, end: int, is_call: bool) -> None:
    data = bytes.fromhex(code).ljust(15, b"\x90")
    assert gdb_script.decode_site(0x1000, data) == gdb_script.Site(0x1000 + end, is_call)


@pytest.mark.parametrize("code", ["", "cc", "0f", "0f 05", "2e", "ff d0"])
def test_what_is_no_site(code: str) -> None:
    assert gdb_script.decode_site(0x1000, bytes.fromhex(code)) is None


MAPPINGS = """process 21
Mapped address spaces:

          Start Addr           End Addr       Size     Offset  Perms  objfile
            0x401000           0x402000     0x1000     0x1000  r-xp   /bin/my program
      0x7f0000000000     0x7f0000300000   0x300000        0x0  r--s   /memfd:optpoline (deleted)
      0x7f0000300000     0x7f0000400000   0x100000   0x300000  r-xs   /memfd:optpoline (deleted)
      0x7f0000500000     0x7f0000600000   0x100000        0x0  rw-p
      0x7f0000700000     0x7f0000800000   0x100000        0x0         /memfd:optpoline (deleted)
"""


def test_mappings_are_read() -> None:
    mappings = gdb_script.parse_mappings(MAPPINGS)
    assert [m.start for m in mappings][:2] == [0x401000, 0x7F0000000000]
    assert [m.is_arena for m in mappings] == [False, True, True, False, True]
    assert gdb_script.find_arenas(mappings) == [0x7F0000000000, 0x7F0000700000]


# --- the script for perf

NAME = layout.ARENA_PATH.encode()


def _mapping(name: bytes, pid: int = 1, *, version: int = 2) -> bytes:
    """Return a PERF_RECORD_MMAP or MMAP2 as perf writes it."""
    kind, off = {1: (1, 40), 2: (10, 72)}[version]
    padded = name.ljust((len(name) + 8) // 8 * 8, b"\0")
    head = struct.pack("<IHHii", kind, 2, off + len(padded), pid, pid)
    return head.ljust(off, b"\x01") + padded


def _profile(*records: bytes, features: int = 0, is_pipe: bool = False) -> bytes:
    """Return a profile with these records."""
    size = 16 if is_pipe else 104
    header = b"PERFILE2" + size.to_bytes(8, "little")
    return (
        header.ljust(72, b"\1")[: min(size, 72)]
        + (b"" if is_pipe else features.to_bytes(32, "little"))
        + b"".join(records)
    )


@pytest.fixture
def own_map() -> Iterator[Path]:
    """Make a map of this process, as a session would."""
    path = Path(f"/tmp/perf-{os.getpid()}.map")
    path.write_text("1000 10 optpoline:promoted:f\n")
    yield path
    path.unlink()


@pytest.mark.parametrize("version", [1, 2])
def test_renaming_keeps_every_size(
    tmp_path: Path, own_map: Path, capsys: pytest.CaptureFixture[str], version: int
) -> None:
    path = tmp_path / "perf.data"
    records = [_mapping(name, os.getpid(), version=version) for name in (b"//anon", NAME, b"/x")]
    path.write_bytes(_profile(*records))
    size = path.stat().st_size
    inode = path.stat().st_ino
    assert perf_script.main([str(path)]) == 0
    changed = path.read_bytes()
    assert len(changed) == size
    assert path.stat().st_ino == inode
    assert NAME not in changed
    assert changed.count(b"//anon") == 2
    assert changed == _profile(*records).replace(NAME, b"//anon".ljust(len(NAME), b"\0"))
    # Once more is no error: the names are there.
    assert perf_script.main([str(path)]) == 0
    assert path.read_bytes() == changed
    assert capsys.readouterr() == ("", "")


GONE = 1 << 22
"""A process id that no process has."""


@pytest.mark.parametrize(
    ("profile", "reason"),
    [
        (b"", "is empty"),
        (b"#!/bin/sh\n" + NAME, "is no profile of perf's"),
        (_profile(_mapping(b"//anon")), "has no block in it"),
        (_profile(_mapping(b"/x"), is_pipe=True), "has no block in it"),
        (_profile(features=1 << 27), "is compressed"),
        (_profile(_mapping(b"/x"), struct.pack("<IHH", 81, 0, 8), is_pipe=True), "is compressed"),
        (_profile(_mapping(NAME, GONE)), f"is ready, but /tmp/perf-{GONE}.map is gone"),
    ],
)
def test_why_there_will_be_no_names(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], profile: bytes, reason: str
) -> None:
    path = tmp_path / "perf.data"
    path.write_bytes(profile)
    for _ in range(2):
        assert perf_script.main([str(path)]) == 1
        assert capsys.readouterr().err.startswith(f"optpoline-perf.py: {path} {reason}")
    if NAME not in profile or not profile.startswith(b"PERF"):
        assert path.read_bytes() == profile
    # As a filter it hands on what it gets.
    script = [sys.executable, str(SHARE / "optpoline-perf.py")]
    done = subprocess.run(script, input=profile, capture_output=True, check=False)
    assert done.returncode == 1
    assert done.stderr.decode().startswith(f"optpoline-perf.py: standard input {reason}")
    assert len(done.stdout) == len(profile)


def test_what_is_not_there(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for path, reason in ((tmp_path / "nope.data", "No such file"), (tmp_path, "Is a directory")):
        assert perf_script.main([str(path)]) == 1
        assert capsys.readouterr().err.startswith(f"optpoline-perf.py: {path}: {reason}")


def test_usage_of_the_script_for_perf(capsys: pytest.CaptureFixture[str]) -> None:
    assert perf_script.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert out.startswith("usage: ")
    assert err == ""
    assert perf_script.main(["a", "b"]) == 2
    assert perf_script.main(["--in-place"]) == 2
    assert capsys.readouterr().err.startswith("usage: ")
