# SPDX-License-Identifier: Apache-2.0
"""The pages of the header's macros: the program of each, and the disassembly that it shows."""

from __future__ import annotations

import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection

from optpoline.process.memory import RemoteMemory
from optpoline.process.procfs import read_maps

__all__ = ["Insn", "Page", "Program", "disassemble", "list_changed"]

_ROOT = Path(__file__).resolve().parents[2]
_INCLUDE = _ROOT / "src" / "optpoline" / "share" / "include"
_PROGRAM = "## A complete program"
_LISTINGS = "## What the compiler makes of it"
_BLOCK = re.compile(r"(?:^    .*\n|^\n(?=    ))+", re.MULTILINE)
_INSN = re.compile(r"((?:[0-9a-f]{2} )+)\s+(?:cs )*([a-z]\w*)")


@dataclass(frozen=True, slots=True)
class Insn:
    """An instruction as far as it is the same in every build.

    Attributes:
        size: Its length in bytes.
        mnemonic: Its name, without prefixes of no effect.
    """

    size: int
    mnemonic: str


@dataclass(frozen=True, slots=True)
class Page:
    """What is taken from a page.

    Attributes:
        source: Its complete program.
        listings: Its listings, in order.
    """

    source: str
    listings: tuple[tuple[Insn, ...], ...]

    @classmethod
    def read(cls, name: str) -> Page:
        """Read a page of the documentation."""
        text = (_ROOT / "docs" / name).read_text()
        listings = tuple(
            _read_insns(block) for block in _BLOCK.findall(_find_section(text, _LISTINGS))
        )
        source, *_ = _BLOCK.findall(_find_section(text, _PROGRAM))
        return cls(re.sub(r"^    ", "", source, flags=re.MULTILINE), listings)

    def build(self, path: Path, *flags: str) -> None:
        """Compile its program, without a warning."""
        strict = ("-Wall", "-Wextra", "-pedantic", "-Werror")
        command = ["gcc", "-O2", *strict, *flags, f"-I{_INCLUDE}", "-x", "c", "-", "-o", str(path)]
        subprocess.run(command, input=self.source, text=True, check=True)


class Program:
    """A running program that answers each line with one."""

    def __init__(self, path: Path) -> None:
        """Start it."""
        self._path = path
        self._symbols = _read_symbols(path)
        self.process = subprocess.Popen(
            [str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        self.pid = self.process.pid

    def tell(self, line: str) -> None:
        """Send it a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()

    def hear(self) -> str:
        """Return a line that it wrote."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().rstrip("\n")

    def ask(self, line: str) -> str:
        """Send it a line, return the next one that it writes."""
        self.tell(line)
        return self.hear()

    def read_function(self, name: str) -> tuple[int, bytes]:
        """Return where a function is, and its code as it is in memory now."""
        base = next(m.start for m in read_maps(self.pid) if m.path == str(self._path))
        addr, size = self._symbols[name]
        with RemoteMemory(self.pid) as memory:
            return base + addr, memory.read(base + addr, size)


def disassemble(code: bytes, scratch: Path) -> tuple[Insn, ...]:
    """Have objdump disassemble code; ``scratch`` is a file for it."""
    scratch.write_bytes(code)
    command = ["objdump", "-D", "-w", "-b", "binary", "-m", "i386:x86-64", str(scratch)]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    listing = done.stdout.split("<.data>:\n")[1]
    return _read_insns(re.sub(r"^.*?:", "", listing, flags=re.MULTILINE))


def list_changed(
    before: bytes, after: bytes, insns: tuple[Insn, ...], scratch: Path
) -> tuple[Insn, ...]:
    """Return the instructions of which a byte has changed, as they are now.

    Args:
        before: Code as it was.
        after: As it is.
        insns: What it was, disassembled; no boundary has moved.
        scratch: A file for objdump.
    """
    changed: list[Insn] = []
    off = 0
    for insn in insns:
        end = off + insn.size
        if before[off:end] != after[off:end]:
            changed += disassemble(after[off:end], scratch)
        off = end
    return tuple(changed)


def _find_section(text: str, heading: str) -> str:
    """Return a section of a page."""
    return text.split(heading + "\n", 1)[1].split("\n## ")[0]


def _read_insns(listing: str) -> tuple[Insn, ...]:
    """Read instructions that stand behind their bytes, one a line."""
    found = [_INSN.match(line.strip()) for line in listing.splitlines()]
    return tuple(Insn(len(one[1].split()), one[2]) for one in found if one)


def _read_symbols(path: Path) -> dict[str, tuple[int, int]]:
    """Return address in the file and size of each symbol."""
    with path.open("rb") as stream:
        table = ELFFile(stream).get_section_by_name(".symtab")
        assert isinstance(table, SymbolTableSection)
        return {one.name: (one["st_value"], one["st_size"]) for one in table.iter_symbols()}
