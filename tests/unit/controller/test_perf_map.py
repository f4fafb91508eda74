# SPDX-License-Identifier: Apache-2.0
"""The map of blocks for profilers: what it says, and whose files it leaves alone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from optpoline.controller.perf_map import UPDATE_EVERY_S, PerfMap, format_map, remove_perf_map
from optpoline.model import Addr
from optpoline.patch.layout import BlockEntry, BlockKind, BlockState

PID = 4321
OWN_PID = 7
"""As the program itself sees it."""

STATUS = f"""Name:\tprogram
State:\tR (running)
Tgid:\t{PID}
Pid:\t{PID}
PPid:\t1
TracerPid:\t0
Uid:\t{os.getuid()}\t{os.geteuid()}\t{os.geteuid()}\t{os.geteuid()}
Gid:\t{os.getgid()}\t{os.getegid()}\t{os.getegid()}\t{os.getegid()}
NSpid:\t{PID}\t{OWN_PID}
Kthread:\t0
Threads:\t1
CapEff:\t0000000000000000
Seccomp:\t0
"""


def _block(addr: int, *, kind: BlockKind = BlockKind.PROMOTED, size: int = 0x1A) -> BlockEntry:
    """Return an entry; its site is 16 bytes into the function named after it."""
    return BlockEntry(
        addr=Addr(addr),
        size=size + 32,
        text_size=size,
        crc=addr ^ size,
        site_addr=Addr(addr & 0xFFF | 0x1000),
        head=bytes(8),
        kind=kind,
        state=BlockState.LIVE,
    )


def _symbol_at(addr: int) -> str | None:
    """Name all addresses but one."""
    return None if addr == 0x1FF0 else f"f{addr:x}+0x10"


ONE = [_block(0x55550000_0040)]
ONE_LINE = "555500000040 1a optpoline:promoted:f1040+0x10\n"
TWO = [_block(0x55550000_0080, kind=BlockKind.COUNTING, size=0x5B), *ONE]
TWO_LINES = ONE_LINE + "555500000080 5b optpoline:counting:f1080+0x10\n"


@pytest.fixture
def proc(tmp_path: Path) -> Path:
    """Return a /proc with one program, which has a /tmp."""
    (tmp_path / str(PID) / "root" / "tmp").mkdir(parents=True)
    (tmp_path / str(PID) / "status").write_text(STATUS)
    return tmp_path


@pytest.fixture
def folder(proc: Path) -> Path:
    """Return the program's /tmp."""
    return proc / str(PID) / "root" / "tmp"


@pytest.fixture
def path(folder: Path) -> Path:
    """Return where its map is."""
    return folder / f"perf-{OWN_PID}.map"


def _map_of(proc: Path) -> PerfMap:
    return PerfMap(PID, _symbol_at, proc_root=proc)


def test_lines_are_in_address_order_and_lower_case() -> None:
    assert format_map(TWO, _symbol_at).decode() == TWO_LINES


def test_a_site_without_a_symbol_has_its_address() -> None:
    line = format_map([_block(0xABCD_EFF0)], _symbol_at)
    assert line == b"abcdeff0 1a optpoline:promoted:0x1ff0\n"


def test_a_name_cannot_add_a_line() -> None:
    assert format_map(ONE, lambda _: "a\nb c").endswith(b":a?b c\n")


def test_written_and_removed(proc: Path, folder: Path, path: Path) -> None:
    names = _map_of(proc)
    assert names.update(ONE, 10.0) is None
    assert path.read_text() == ONE_LINE
    assert path.stat().st_mode & 0o7777 == 0o644
    assert path.stat().st_uid == os.geteuid()
    assert os.listdir(folder) == [path.name]
    names.remove()
    assert os.listdir(folder) == []
    assert names.update(TWO, 20.0) is None
    assert os.listdir(folder) == []


def test_no_block_no_file(proc: Path, folder: Path) -> None:
    names = _map_of(proc)
    assert names.update([], 10.0) is None
    names.remove()
    assert os.listdir(folder) == []


def test_changed_about_once_a_second(proc: Path, path: Path) -> None:
    names = _map_of(proc)
    assert names.is_due(10.0)
    names.update(ONE, 10.0)
    inode = path.stat().st_ino
    names.update(ONE, 20.0)
    assert path.stat().st_ino == inode
    assert names.is_due(20.0)
    names.update(TWO, 20.0)
    assert path.read_text() == TWO_LINES
    assert path.stat().st_ino != inode
    assert not names.is_due(20.0 + UPDATE_EVERY_S / 2)
    assert names.is_due(20.0 + UPDATE_EVERY_S)
    names.remove()


def test_a_block_made_anew_for_another_site_is_a_change(proc: Path, path: Path) -> None:
    names = _map_of(proc)
    names.update(ONE, 10.0)
    (old,) = ONE
    other = BlockEntry(
        addr=old.addr,
        size=old.size,
        text_size=old.text_size,
        crc=old.crc,
        site_addr=Addr(0x1234),
        head=old.head,
        kind=old.kind,
        state=old.state,
    )
    names.update([other], 20.0)
    assert "f1234" in path.read_text()
    names.remove()


def test_it_stays_when_closed(proc: Path, path: Path) -> None:
    names = _map_of(proc)
    names.update(ONE, 10.0)
    names.close()
    names.remove()
    assert path.read_text() == ONE_LINE
    remove_perf_map(PID, proc_root=proc)
    assert not path.exists()


def test_removed_after_the_program_is_gone(proc: Path, folder: Path) -> None:
    names = _map_of(proc)
    names.update(ONE, 10.0)
    (proc / str(PID) / "status").unlink()
    (proc / str(PID) / "root").rename(proc / "elsewhere")
    names.remove()
    assert os.listdir(proc / "elsewhere" / "tmp") == []
    remove_perf_map(PID, proc_root=proc)  # nothing to find, nothing to raise


def test_one_left_by_an_earlier_controller_is_replaced(proc: Path, path: Path) -> None:
    path.write_text(TWO_LINES)
    names = _map_of(proc)
    assert names.update(ONE, 10.0) is None
    assert path.read_text() == ONE_LINE
    names.remove()


STALE = "perf-999.map"


def test_maps_of_programs_that_are_gone_go(proc: Path, folder: Path, path: Path) -> None:
    (folder / STALE).write_text(TWO_LINES)
    (folder / "perf-1000.map").write_text(ONE_LINE)
    names = _map_of(proc)
    assert names.update(ONE, 10.0) is None
    assert os.listdir(folder) == [path.name]
    (folder / STALE).write_text(TWO_LINES)
    remove_perf_map(PID, proc_root=proc)
    assert os.listdir(folder) == []


@pytest.mark.parametrize("pids", ["999", "999\t3", "5\t999"])
def test_maps_of_programs_that_live_stay(proc: Path, folder: Path, pids: str) -> None:
    pid = pids.split()[0]
    (proc / pid).mkdir()
    status = STATUS.replace(f"NSpid:\t{PID}\t{OWN_PID}", f"NSpid:\t{pids}")
    (proc / pid / "status").write_text(status)
    (folder / STALE).write_text(TWO_LINES)
    remove_perf_map(PID, proc_root=proc)
    assert os.listdir(folder) == [STALE]
    shutil.rmtree(proc / pid)
    remove_perf_map(PID, proc_root=proc)
    assert os.listdir(folder) == []


OTHERS_NAMES = ("perf-0999.map", "perf-999.map.old", ".perf-999.map", "perf-x.map", "perf-.map")


@pytest.mark.parametrize("name", OTHERS_NAMES)
def test_other_files_stay(proc: Path, folder: Path, name: str) -> None:
    (folder / name).write_text(ONE_LINE)
    remove_perf_map(PID, proc_root=proc)
    assert os.listdir(folder) == [name]


@pytest.mark.skipif(os.geteuid() != 0, reason="needs to be root to give files away")
def test_maps_of_another_user_s_programs_stay(proc: Path, folder: Path) -> None:
    (folder / STALE).write_text(ONE_LINE)
    os.chown(folder / STALE, 65534, 65534)
    remove_perf_map(PID, proc_root=proc)
    assert os.listdir(folder) == [STALE]


def test_stale_links_and_pipes_stay(proc: Path, folder: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(ONE_LINE)
    (folder / STALE).symlink_to(elsewhere)
    os.mkfifo(folder / "perf-1000.map")
    os.link(elsewhere, folder / "perf-1001.map")
    remove_perf_map(PID, proc_root=proc)
    assert sorted(os.listdir(folder)) == ["perf-1000.map", STALE]
    assert elsewhere.read_text() == ONE_LINE


FOREIGN = {
    "theirs": "7f0000001000 20 LazyCompile:*main\n",
    "theirs behind ours": ONE_LINE + "7f0000001000 20 LazyCompile:*main\n",
    "just opened": "",
    "no map": "hello",
}


@pytest.mark.parametrize("text", FOREIGN.values(), ids=list(FOREIGN))
def test_a_map_of_the_program_is_left_alone(
    proc: Path, folder: Path, path: Path, text: str
) -> None:
    path.write_text(text)
    names = _map_of(proc)
    note = names.update(ONE, 10.0)
    assert note == (
        f"profilers find no names of blocks in /tmp/{path.name}: the program itself writes it"
    )
    assert names.update(TWO, 20.0) is None  # told once
    names.remove()
    remove_perf_map(PID, proc_root=proc)
    assert path.read_text() == text
    assert os.listdir(folder) == [path.name]


@pytest.mark.parametrize("text", FOREIGN.values(), ids=list(FOREIGN))
def test_a_stale_map_of_another_s_is_left_alone(proc: Path, folder: Path, text: str) -> None:
    (folder / STALE).write_text(text)
    remove_perf_map(PID, proc_root=proc)
    assert (folder / STALE).read_text() == text


@pytest.mark.parametrize("text", FOREIGN.values(), ids=list(FOREIGN))
def test_a_map_the_program_begins_later_is_left_alone(proc: Path, path: Path, text: str) -> None:
    names = _map_of(proc)
    assert names.update(ONE, 10.0) is None
    path.write_text(text)
    assert "the program itself" in (names.update(TWO, 20.0) or "")
    names.remove()
    assert path.read_text() == text


def test_links_are_not_followed(proc: Path, folder: Path, path: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.write_text(TWO_LINES)
    path.symlink_to(elsewhere)
    names = _map_of(proc)
    assert names.update(ONE, 10.0)
    names.remove()
    remove_perf_map(PID, proc_root=proc)
    assert path.is_symlink()
    assert elsewhere.read_text() == TWO_LINES


def test_a_pipe_of_that_name_does_not_hang_us(proc: Path, path: Path) -> None:
    os.mkfifo(path)
    names = _map_of(proc)
    assert names.update(ONE, 10.0)
    names.remove()
    assert path.is_fifo()


@pytest.mark.parametrize("what", ["missing", "a link", "a file"])
def test_without_a_directory_there_is_a_note(
    proc: Path, folder: Path, tmp_path: Path, what: str
) -> None:
    folder.rmdir()
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    if what == "a link":
        folder.symlink_to(elsewhere)
    elif what == "a file":
        folder.write_text("")
    names = _map_of(proc)
    assert "profilers find no names" in (names.update(ONE, 10.0) or "")
    assert names.update(TWO, 20.0) is None
    names.remove()
    assert os.listdir(elsewhere) == []


def test_a_program_that_is_gone_is_no_error(proc: Path) -> None:
    (proc / str(PID) / "status").unlink()
    assert _map_of(proc).update(ONE, 10.0)
