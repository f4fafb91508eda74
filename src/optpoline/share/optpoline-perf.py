# SPDX-License-Identifier: Apache-2.0
"""Let perf name samples inside optpoline's blocks, in a profile recorded before.

    python3 optpoline-perf.py perf.data         change that file, in place
    python3 optpoline-perf.py <in >out          or as a filter

perf looks for names in ``/tmp/perf-PID.map`` only for code in anonymous memory (and
so finds none for code that any compiler keeps in a memfd). This gives the mappings
of arenas that name in the profile; each record keeps its size. It stands alone.

Exit status: 0 if perf will find names (also if that was done before), 1 if it will not,
with the reason, 2 for wrong usage.
"""

from __future__ import annotations

import mmap
import struct
import sys
from pathlib import Path

__all__ = ["ProfileError", "main", "rename_arenas"]

ARENA_PATH = b"/memfd:optpoline (deleted)"
ANONYMOUS = b"//anon"
"""As perf calls it: is_anon_memory() in tools/perf/util/map.h."""

RENAMED = ANONYMOUS.ljust(len(ARENA_PATH), b"\0")
"""No other record has that many zeros behind the name: it is filled up to 8 bytes."""

USAGE = "usage: optpoline-perf.py [PERF_DATA]"

# struct perf_file_header and perf_pipe_file_header, tools/perf/util/header.h
_MAGIC = b"PERFILE2"
_PIPE_HEADER_SIZE = 16
_FEATURES_OFF = 72
_HEADER_COMPRESSED = 27

# enum perf_event_type and perf_user_event_type, with where the name of a mapping begins
_NAME_OFFS = {1: 40, 10: 72}
_COMPRESSED_RECORDS = frozenset({81, 83})

Profile = bytes | mmap.mmap


class ProfileError(Exception):
    """Why perf will not name blocks of a profile."""


def rename_arenas(profile: bytes) -> bytes:
    """Return a profile in which arenas are anonymous memory.

    >>> rename_arenas(b"<" + ARENA_PATH + bytes(6) + b">").rstrip(b">").rstrip(bytes(1))
    b'<//anon'
    """
    return profile.replace(ARENA_PATH, RENAMED)


def _find(profile: Profile, name: bytes) -> list[int]:
    """Return every offset of a name."""
    offs: list[int] = []
    off = profile.find(name)
    while off >= 0:
        offs.append(off)
        off = profile.find(name, off + len(name))
    return offs


def _find_arenas(profile: Profile) -> tuple[list[int], list[int]]:
    """Return the offsets of arenas' names, and of those that were changed before.

    Raises:
        ProfileError: if there is none at all.
    """
    if not len(profile):
        raise ProfileError("is empty")
    if profile[: len(_MAGIC)] != _MAGIC:
        raise ProfileError("is no profile of perf's")
    offs, done = _find(profile, ARENA_PATH), _find(profile, RENAMED)
    if not offs and not done:
        if _is_compressed(profile):
            raise ProfileError("is compressed: record it without -z")
        raise ProfileError("has no block in it: none was mapped while it was recorded")
    return offs, done


def _is_compressed(profile: Profile) -> bool:
    """Tell whether a file says that it has compressed records, or a stream has one."""
    if len(profile) < _PIPE_HEADER_SIZE:
        return False
    (header_size,) = struct.unpack_from("<Q", profile, len(_MAGIC))
    if header_size > _PIPE_HEADER_SIZE:
        features = profile[_FEATURES_OFF : _FEATURES_OFF + 8]
        return bool(int.from_bytes(features, "little") >> _HEADER_COMPRESSED & 1)
    off = header_size
    while off + 8 <= len(profile):
        kind, _, size = struct.unpack_from("<IHH", profile, off)
        if kind in _COMPRESSED_RECORDS:
            return True
        if size < 8:
            return False  # what follows some kinds of record is counted elsewhere
        off += size
    return False


def _find_pid(profile: Profile, name_off: int) -> int | None:
    """Return whose mapping a name is of."""
    for kind, off in _NAME_OFFS.items():
        if name_off >= off:
            found, _, size, pid = struct.unpack_from("<IHHi", profile, name_off - off)
            if found == kind and size > off:
                return int(pid)
    return None


def _has_map(pid: int) -> bool:
    """Tell whether names of a process's blocks are there, in its own view or in ours."""
    own_pid = str(pid)
    try:
        for line in Path(f"/proc/{pid}/status").read_text(errors="replace").splitlines():
            if line.startswith("NSpid:"):
                own_pid = line.split()[-1]
    except OSError:
        pass  # it is gone, and its map may have been kept
    paths = (f"/proc/{pid}/root/tmp/perf-{own_pid}.map", f"/tmp/perf-{pid}.map")
    return any(Path(path).exists() for path in paths)


def _check_maps(pids: set[int]) -> None:
    """Make sure that perf will find a map of each process.

    Raises:
        ProfileError: if it will not.
    """
    for pid in sorted(pids):
        if not _has_map(pid):
            raise ProfileError(
                f"is ready, but /tmp/perf-{pid}.map is gone, which has the names: it goes with the "
                "blocks, so keep a copy, or run perf report before the session ends"
            )


def _change_file(path: Path) -> None:
    """Change a profile in place; other bytes of it are not written."""
    with path.open("r+b") as file:
        if not path.stat().st_size:
            raise ProfileError("is empty")
        with mmap.mmap(file.fileno(), 0) as profile:
            offs, done = _find_arenas(profile)
            pids = {_find_pid(profile, off) for off in (*offs, *done)}
            for off in offs:
                profile[off : off + len(RENAMED)] = RENAMED
    _check_maps({pid for pid in pids if pid is not None})


def _filter() -> None:
    """Change a profile on its way from standard input to standard output."""
    profile = sys.stdin.buffer.read()
    try:
        offs, done = _find_arenas(profile)
    except ProfileError:
        # Whoever reads it may do without names.
        sys.stdout.buffer.write(profile)
        raise
    sys.stdout.buffer.write(rename_arenas(profile))
    sys.stdout.buffer.flush()
    pids = {_find_pid(profile, off) for off in (*offs, *done)}
    _check_maps({pid for pid in pids if pid is not None})


def main(args: list[str]) -> int:
    """Run it; return the exit status."""
    if args in (["-h"], ["--help"]):
        sys.stdout.write(f"{USAGE}\n\n{__doc__}")
        return 0
    if len(args) > 1 or any(arg.startswith("-") for arg in args):
        sys.stderr.write(f"{USAGE}\n")
        return 2
    name = args[0] if args else "standard input"
    try:
        if args:
            _change_file(Path(name))
        else:
            _filter()
    except ProfileError as error:
        sys.stderr.write(f"optpoline-perf.py: {name} {error}\n")
        return 1
    except OSError as error:
        sys.stderr.write(f"optpoline-perf.py: {name}: {error.strerror or error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
