# SPDX-License-Identifier: Apache-2.0
"""Names of blocks for profilers: ``/tmp/perf-PID.map`` as the program sees it.

The format is that of tools/perf/Documentation/jit-interface.txt, a line a block::

    START SIZE optpoline:promoted:luaV_execute+0x123        hex, without 0x

The file is in the *program's* view: its root directory, its process id in its own
namespace, owned by its user, so that what profiles the program finds it wherever
that runs, and a compiler in the program that keeps such a file finds one it may write.

Invariants:
  * A file that holds one line of somebody else's is theirs: never replaced, never removed.
  * A map whose program ended with nobody there is removed by the next session, or the next
    ``detach``, that comes to its directory: if it is ours, belongs to the user of the
    program that is worked on, and no process that can be seen has its id.
  * No symbolic link is followed, neither for the directory nor for the file.
  * The file is whole at every moment: written beside, then moved into place.
  * Nothing here makes a session fail; what cannot be done is a sentence to be told.
"""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from optpoline.errors import OptpolineError, ProcessGone
from optpoline.model import Addr
from optpoline.patch.layout import BlockEntry
from optpoline.process.procfs import read_status

__all__ = ["PerfMap", "format_map", "remove_perf_map"]

UPDATE_EVERY_S = 1.0
"""Shortest time between two changes of the file: it is read when a profile ends."""

_MODE = 0o644
_PROC = Path("/proc")
_MAP_NAME = re.compile(r"perf-([1-9][0-9]{0,9})\.map")
_OUR_LINE = re.compile(rb"[0-9a-f]+ [0-9a-f]+ optpoline:")
_CHUNK_SIZE = 1 << 16

SymbolAt = Callable[[int], str | None]


def format_map(blocks: Iterable[BlockEntry], symbol_at: SymbolAt) -> bytes:
    """Return the file's bytes for some blocks, in address order.

    Args:
        blocks: Live and retired ones.
        symbol_at: Names the address of a site.
    """
    lines = []
    for block in sorted(blocks, key=lambda block: block.addr):
        # A name may hold anything but the end of a line.
        symbol = (symbol_at(block.site_addr) or f"{block.site_addr:#x}").replace("\n", "?")
        kind = block.kind.name.lower()
        lines.append(f"{block.addr:x} {block.text_size:x} optpoline:{kind}:{symbol}\n")
    return "".join(lines).encode(errors="replace")


class PerfMap:
    """The map of one program, kept up while a session lasts.

    Args:
        pid: The program.
        symbol_at: Names an address in it.
        proc_root: Where ``/proc`` is.
    """

    def __init__(self, pid: int, symbol_at: SymbolAt, *, proc_root: Path = _PROC) -> None:
        """Prepare; nothing is opened before there is something to write."""
        self._pid = pid
        self._symbol_at = symbol_at
        self._proc_root = proc_root
        self._folder: _Folder | None = None
        self._is_given_up = False
        self._blocks: frozenset[tuple[Addr, int, Addr]] = frozenset()
        self._next_s = 0.0

    def is_due(self, now_s: float) -> bool:
        """Tell whether the file may be changed again without changing it too often.

        Args:
            now_s: The time, ``time.monotonic()``.
        """
        return now_s >= self._next_s and not self._is_given_up

    def update(self, blocks: Iterable[BlockEntry], now_s: float) -> str | None:
        """Make the file tell of these blocks, unless it does.

        Args:
            blocks: All live and retired ones.
            now_s: The time, ``time.monotonic()``.

        Returns:
            Why blocks will have no names, once; else None.
        """
        if self._is_given_up:
            return None
        blocks = tuple(blocks)
        key = frozenset((block.addr, block.crc, block.site_addr) for block in blocks)
        if key == self._blocks:
            return None
        self._next_s = now_s + UPDATE_EVERY_S
        try:
            if self._folder is None:
                self._folder = _Folder(self._pid, self._proc_root)
                self._folder.remove_stale()
            if not self._folder.replace(format_map(blocks, self._symbol_at)):
                raise OptpolineError("the program itself writes it")
        except (OSError, OptpolineError) as error:
            self._is_given_up = True
            reason = error.strerror if isinstance(error, OSError) else str(error)
            return f"profilers find no names of blocks in {self._name}: {reason}"
        self._blocks = key
        return None

    @property
    def _name(self) -> str:
        """How the program calls the file."""
        return f"/tmp/{self._folder.name}" if self._folder is not None else "/tmp/perf-PID.map"

    def remove(self) -> None:
        """Take the file away: no block is left; also after the program's end."""
        if self._folder is not None:
            with contextlib.suppress(OSError):  # such as a file system that is read-only by now
                self._folder.remove()
        self.close()

    def close(self) -> None:
        """Let go of the directory; the file stays for whoever profiles what was left."""
        if self._folder is not None:
            self._folder.close()
            self._folder = None
        self._is_given_up = True


def remove_perf_map(pid: int, *, proc_root: Path = _PROC) -> None:
    """Take away a map that an earlier controller left; somebody else's stays.

    Maps of programs that are gone go with it.
    """
    with contextlib.suppress(OSError, OptpolineError):
        folder = _Folder(pid, proc_root)
        try:
            folder.remove()
            folder.remove_stale()
        finally:
            folder.close()


class _Folder:
    """The program's /tmp, and our file in it."""

    def __init__(self, pid: int, proc_root: Path) -> None:
        """Open the directory, which stays ours when the program has gone."""
        self._proc_root = proc_root
        status = read_status(pid, proc_root=proc_root)
        # Innermost last: the id that the program itself knows, and perf looks for.
        self.name = f"perf-{status.ns_pids[-1]}.map"
        self._owner = status.uids[1], status.gids[1]
        # An absolute symbolic link would lead out of the program's root, into ours.
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
        self._fd = os.open(proc_root / str(pid) / "root" / "tmp", flags)

    def close(self) -> None:
        """Close the directory."""
        os.close(self._fd)

    def replace(self, data: bytes) -> bool:
        """Write the file anew; False if it is somebody else's."""
        found = self._is_ours(self.name)
        if found is False:
            return False
        with self._written_beside(data) as beside:
            if found is None:
                try:
                    # Unlike a rename, a link never takes the place of what came meanwhile.
                    os.link(beside, self.name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
                except FileExistsError:
                    return False
            else:
                os.rename(beside, self.name, src_dir_fd=self._fd, dst_dir_fd=self._fd)
        return True

    def remove(self) -> None:
        """Remove the file if it is ours."""
        if self._is_ours(self.name):
            os.unlink(self.name, dir_fd=self._fd)

    def remove_stale(self) -> None:
        """Remove the maps of programs that are gone, as far as that can be told and done."""
        with contextlib.suppress(OSError, OptpolineError):
            found = {
                name: int(match[1])
                for name in os.listdir(self._fd)
                if (match := _MAP_NAME.fullmatch(name)) and name != self.name
            }
            left = {name: pid for name, pid in found.items() if self._is_left(name)}
            # Asked after the files were seen: who has come since has made its own anew.
            living = _list_own_pids(self._proc_root) if left else frozenset()
            for name, pid in left.items():
                if pid not in living:
                    os.unlink(name, dir_fd=self._fd)

    def _is_left(self, name: str) -> bool:
        """Tell whether a file is a map of ours, of the same user's program."""
        status = os.stat(name, dir_fd=self._fd, follow_symlinks=False)
        return status.st_uid == self._owner[0] and bool(self._is_ours(name))

    @contextmanager
    def _written_beside(self, data: bytes) -> Iterator[str]:
        """Give the name of a file with these bytes; it is gone afterwards, unless moved."""
        beside = f".{self.name}.{secrets.token_hex(8)}"
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        fd = os.open(beside, flags, 0o600, dir_fd=self._fd)
        try:
            with open(fd, "wb") as file:
                file.write(data)
                file.flush()
                # Without the right to give it away we are the program's user ourselves.
                if os.geteuid() == 0:
                    os.fchown(fd, *self._owner)
                os.fchmod(fd, _MODE)
            yield beside
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(beside, dir_fd=self._fd)

    def _is_ours(self, name: str) -> bool | None:
        """Tell whether every line of a file is ours; None if there is no file."""
        # Not to hang on a pipe of that name.
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            fd = os.open(name, flags, dir_fd=self._fd)
        except FileNotFoundError:
            return None
        except OSError:
            return False  # a symbolic link, or nothing that we may read
        with open(fd, "rb", buffering=_CHUNK_SIZE) as file:
            if not stat.S_ISREG(os.fstat(fd).st_mode):
                return False
            # An empty file was just made by somebody, who has it open.
            return bool(first := file.readline()) and all(
                _OUR_LINE.match(line) for line in (first, *file)
            )


def _list_own_pids(proc_root: Path) -> frozenset[int]:
    """Return the ids of all processes, in every namespace that they are in."""
    pids: set[int] = set()
    for name in os.listdir(proc_root):
        if name.isdecimal():
            with contextlib.suppress(ProcessGone):
                pids.update(read_status(int(name), proc_root=proc_root).ns_pids)
    return frozenset(pids)
