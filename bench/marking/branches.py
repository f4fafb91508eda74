# SPDX-License-Identifier: Apache-2.0
"""Indirect branches that were executed, and whether a note knows them.

Only addresses that were executed are decoded, so there is no guessing where instructions
begin. A branch is indirect if its instruction is, or if it leads to a retpoline. Left out is
what no compiler made of the program's source: entries of the PLT, and the C library's start-up
code. Jumps through switch tables are told apart by what gcc itself says of them: with
``-fcf-protection=branch`` these, and no others, have the prefix ``notrack``.
"""

from __future__ import annotations

import bisect
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from elftools.elf.constants import SH_FLAGS
from elftools.elf.elffile import ELFFile
from elftools.elf.sections import SymbolTableSection
from iced_x86 import Decoder, FlowControl

from bench.callgrind import Executed
from bench.commands import run_command
from bench.paths import OPTPOLINE

__all__ = ["Branch", "find_executed_branches", "read_noted"]

_THUNK = "__x86_indirect_thunk_"
_START_UP = frozenset(
    {"_start", "deregister_tm_clones", "register_tm_clones", "frame_dummy", "__do_global_dtors_aux"}
)
_NOT_COMPILED = (".plt", ".init", ".fini")
_NOTRACK = 0x3E
_LONGEST = 15
_SITES = (str(OPTPOLINE), "sites", "--json", "-")
_INDIRECT = (FlowControl.INDIRECT_BRANCH, FlowControl.INDIRECT_CALL)
_DIRECT = (FlowControl.UNCONDITIONAL_BRANCH, FlowControl.CONDITIONAL_BRANCH, FlowControl.CALL)


@dataclass(frozen=True, slots=True, kw_only=True)
class Branch:
    """An indirect branch that was executed.

    Attributes:
        addr: Its address in the file.
        function: The function that it is in.
        count: How often it was executed.
        is_switch: Whether the compiler says that it jumps through a switch table.
    """

    addr: int
    function: str
    count: int
    is_switch: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class _Code:
    """One section of code."""

    addr: int
    data: bytes


def find_executed_branches(path: Path, executed: Executed) -> tuple[Branch, ...]:
    """Return the indirect branches among the instructions that a program executed.

    Args:
        path: The program, with symbols.
        executed: How often each of its instructions was.
    """
    sections, functions, thunks = _read_code(path)
    starts = [addr for addr, _ in functions]
    found: list[Branch] = []
    for addr, code in _executed_code(sections, executed):
        insn = Decoder(64, code, ip=addr).decode()
        flow = insn.flow_control
        to_thunk = flow in _DIRECT and insn.near_branch_target in thunks
        if flow not in _INDIRECT and not to_thunk:
            continue
        place = bisect.bisect_right(starts, addr) - 1
        function = functions[place][1] if place >= 0 else ""
        if function in _START_UP:
            continue
        found.append(
            Branch(
                addr=addr,
                function=function,
                count=executed[addr],
                is_switch=flow is FlowControl.INDIRECT_BRANCH and code[0] == _NOTRACK,
            )
        )
    return tuple(found)


def read_noted(path: Path) -> frozenset[int]:
    """Return the addresses of the branches that a file's notes name, by ``optpoline sites``."""
    said = cast(dict[str, object], json.loads(run_command([*_SITES, str(path)])))
    declared = cast(list[dict[str, object]], said["declared"])
    return frozenset(
        int(str(one["address"]), 16) for one in declared if one["kind"] == "dynamic_call"
    )


def _executed_code(sections: list[_Code], executed: Executed) -> Iterator[tuple[int, bytes]]:
    """Yield each executed address in the sections with the bytes there."""
    for section in sections:
        for addr in sorted(executed):
            off = addr - section.addr
            if 0 <= off < len(section.data):
                yield addr, section.data[off : off + _LONGEST]


def _read_code(path: Path) -> tuple[list[_Code], list[tuple[int, str]], frozenset[int]]:
    """Return the sections of compiled code, the functions in order, and the thunks."""
    sections: list[_Code] = []
    functions: dict[int, str] = {}
    thunks: set[int] = set()
    with path.open("rb") as stream:
        elf = ELFFile(stream)
        for section in elf.iter_sections():
            if isinstance(section, SymbolTableSection) and section.name == ".symtab":
                for symbol in section.iter_symbols():
                    is_function = symbol["st_info"]["type"] == "STT_FUNC"
                    if not is_function or symbol["st_shndx"] == "SHN_UNDEF":
                        continue
                    functions[int(symbol["st_value"])] = str(symbol.name)
                    if str(symbol.name).startswith(_THUNK):
                        thunks.add(int(symbol["st_value"]))
            is_executable = section["sh_flags"] & SH_FLAGS.SHF_EXECINSTR
            is_code = is_executable and section["sh_type"] == "SHT_PROGBITS"
            if is_code and not section.name.startswith(_NOT_COMPILED):
                sections.append(_Code(addr=int(section["sh_addr"]), data=bytes(section.data())))
    return sections, sorted(functions.items()), frozenset(thunks)
