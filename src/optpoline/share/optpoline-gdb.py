# SPDX-License-Identifier: Apache-2.0
"""Teach gdb about optpoline's blocks: backtraces through them, and names for them.

Load it with ``source PATH`` in gdb, or ``gdb -x PATH``. It stands alone: it runs in
gdb's Python and reads everything from the program, or from its core file.

A block is entered by the branch of its site and leaves by a jump; it pushes nothing,
and but for flags and the operand it changes no register. So the frame below it is the
function of the site, at the site:

    call    the return address lies on top of the stack, as at the start of any function
    jump    nothing was pushed: the function goes on, its registers and stack as at the
            site. gdb looks up a caller by the byte before its pc, which has to be in the
            site's instruction: so the pc given for it is the end of the site.

Outside of gdb nothing happens here but definitions.
"""

from __future__ import annotations

import contextlib
import importlib.util
import re
import struct
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass

with contextlib.suppress(ModuleNotFoundError):
    import gdb
    from gdb.FrameDecorator import FrameDecorator

__all__ = ["Arena", "Block", "Site", "decode_site", "find_arenas", "find_block", "read_arena"]

# The format of arenas, version 5, as in optpoline's patch/layout.py.
ARENA_NAME = "/memfd:optpoline"
MAGIC = b"OPTPOLIN"
VERSION = 5
HEADER = "<8sIIQQQQQQQQQQIIiII4x"
BLOCK = "<QIIQ8sBB2xI"
KINDS = {1: "counting", 2: "promoted", 3: "thunk"}
LIVE, RETIRED, REWRITTEN = 1, 2, 3

_MAX_INSN_SIZE = 15
# cs ds es ss fs gs, operand and address size, lock, repne, rep, REX: all may precede a branch.
_PREFIXES = frozenset((0x2E, 0x3E, 0x26, 0x36, 0x64, 0x65, 0x66, 0x67, 0xF0, 0xF2, 0xF3))
_PREFIXES |= frozenset(range(0x40, 0x50))
_CALL, _JMP, _TWO_BYTES, _JCC = 0xE8, 0xE9, 0x0F, range(0x80, 0x90)
_PLAIN_SIZE = 5  # of the shortest indirect branch that has room for a direct one
_INDIRECT, _CALL_REGISTER, _JMP_REGISTER = 0xFF, range(0xD0, 0xD8), range(0xE0, 0xE8)

_UNLISTED_REGISTERS = {"fs_base", "gs_base"}
_UNLISTED_REGISTERS |= {f"{kind}{n}" for kind in ("xmm", "ymm") for n in range(32)}
"""gdb does not list those that it shows as part of bigger ones; debug information names them."""

_MAPPING = re.compile(r"^\s*0x([0-9a-f]+)\s+0x([0-9a-f]+)\s+0x[0-9a-f]+\s+0x([0-9a-f]+)\b(.*)$")

Read = Callable[[int, int], bytes]
"""Reads memory: address, size."""


@dataclass(frozen=True)
class Arena:
    """What matters of an arena's header: absolute addresses."""

    table: int
    n_blocks: int
    code_start: int
    code_end: int


@dataclass(frozen=True)
class Block:
    """One entry of the block table."""

    addr: int
    size: int
    site_addr: int
    kind: str
    is_retired: bool


@dataclass(frozen=True)
class Site:
    """The branch that leads to a block."""

    end: int
    is_call: bool


@dataclass(frozen=True)
class Mapping:
    """One line of the memory map."""

    start: int
    end: int
    offset: int
    is_arena: bool


def read_arena(start: int, read: Read) -> Arena | None:
    """Return the arena mapped at an address, or None if its header is not one we know."""
    fields = struct.unpack(HEADER, read(start, struct.calcsize(HEADER)))
    if fields[:2] != (MAGIC, VERSION):
        return None
    block_off, code_off, literal_off = fields[4:7]
    return Arena(
        table=start + block_off,
        n_blocks=fields[12],
        code_start=start + code_off,
        code_end=start + literal_off,
    )


def find_block(arena: Arena, pc: int, read: Read) -> Block | None:
    """Return the live or retired block that an address is in, or None."""
    if not arena.code_start <= pc < arena.code_end or not arena.n_blocks:
        return None
    table = read(arena.table, arena.n_blocks * struct.calcsize(BLOCK))
    for addr, size, _, site_addr, _, kind, state, _ in struct.iter_unpack(BLOCK, table):
        if addr <= pc < addr + size and state in (LIVE, RETIRED, REWRITTEN) and kind in KINDS:
            return Block(addr, size, site_addr, KINDS[kind], state == RETIRED)
    return None


def decode_site(site_addr: int, code: bytes) -> Site | None:
    """Return what kind of branch a site is, or None if there is none any more.

    >>> decode_site(0x1000, bytes.fromhex("2ee800000000"))
    Site(end=4102, is_call=True)
    """
    at = 0
    while at < len(code) and code[at] in _PREFIXES:
        at += 1
    opcode = code[at : at + 2]
    if opcode[:1] == bytes((_CALL,)):
        return Site(site_addr + at + 5, is_call=True)
    if opcode[:1] == bytes((_JMP,)):
        return Site(site_addr + at + 5, is_call=False)
    if len(opcode) == 2 and opcode[0] == _TWO_BYTES and opcode[1] in _JCC:
        return Site(site_addr + at + 6, is_call=False)
    # A plain site that got its baseline back while somebody was in its block.
    if len(opcode) == 2 and opcode[0] == _INDIRECT and at + 2 >= _PLAIN_SIZE:
        if opcode[1] in _CALL_REGISTER:
            return Site(site_addr + at + 2, is_call=True)
        if opcode[1] in _JMP_REGISTER:
            return Site(site_addr + at + 2, is_call=False)
    return None


def parse_mappings(text: str) -> list[Mapping]:
    """Return what ``info proc mappings`` lists, of a process or of a core file."""
    return [
        Mapping(
            start=int(match[1], 16),
            end=int(match[2], 16),
            offset=int(match[3], 16),
            is_arena=ARENA_NAME in match[4],
        )
        for match in map(_MAPPING.match, text.splitlines())
        if match
    ]


def find_arenas(mappings: list[Mapping]) -> list[int]:
    """Return where arenas begin."""
    return [mapping.start for mapping in mappings if mapping.is_arena and mapping.offset == 0]


class Finder:
    """Finds blocks in the program that gdb has selected."""

    def __init__(self) -> None:
        """Know no mapping yet."""
        self._mappings: list[Mapping] = []

    def forget(self, _event: object = None) -> None:
        """Forget the mappings: another program, or what it has mapped has changed."""
        self._mappings = []

    def find(self, pc: int) -> Block | None:
        """Return the block that a pc is in, or None."""
        if not any(mapping.start <= pc < mapping.end for mapping in self._mappings):
            # Mapped since the last look; arenas are only ever mapped where nothing was.
            self._mappings = parse_mappings(_ask("info proc mappings"))
        if not any(m.is_arena and m.start <= pc < m.end for m in self._mappings):
            return None
        for start in find_arenas(self._mappings):
            arena = read_arena(start, read_memory)
            block = None if arena is None else find_block(arena, pc, read_memory)
            if block is not None:
                return block
        return None


def read_memory(addr: int, size: int) -> bytes:
    """Read memory of the program, without gdb's own breakpoints in it."""
    return bytes(gdb.selected_inferior().read_memory(addr, size))


def _ask(command: str) -> str:
    """Run a command of gdb and return what it says, "" if it cannot do it."""
    try:
        return str(gdb.execute(command, to_string=True))
    except gdb.error:
        return ""


def describe(block: Block) -> str:
    """Name a block, as ``optpoline block for work+103``."""
    found = _ask(f"info symbol {block.site_addr:#x}").partition(" in section")[0].strip()
    known = found and not found.startswith("No symbol")
    return f"optpoline block for {found.replace(' ', '') if known else hex(block.site_addr)}"


class FrameId:
    """What tells a block's frame from others; gdb brings such a class from 14 on."""

    def __init__(self, sp: gdb.Value, pc: gdb.Value) -> None:
        """Keep both."""
        self.sp = sp
        self.pc = pc


class BlockUnwinder:
    """Unwinds out of a block."""

    name = "optpoline"
    enabled = True

    def __init__(self, finder: Finder) -> None:
        """Use a finder."""
        self._finder = finder

    def __call__(self, frame: gdb.PendingFrame) -> gdb.UnwindInfo | None:
        """Return how the frame below looks, or None if this one is in no block."""
        pc = frame.read_register("pc")
        try:
            block = self._finder.find(int(pc))
            if block is None:
                return None
            site = decode_site(block.site_addr, read_memory(block.site_addr, _MAX_INSN_SIZE))
            if site is None:
                return None
            return self._unwind(frame, block, site)
        except gdb.MemoryError:
            return None  # half unmapped: gdb does what it can

    def _unwind(self, frame: gdb.PendingFrame, block: Block, site: Site) -> gdb.UnwindInfo:
        """Describe the site's function as the caller."""
        pc, sp = frame.read_register("rip"), frame.read_register("rsp")
        info = frame.create_unwind_info(FrameId(sp, gdb.Value(block.addr).cast(pc.type)))
        names = {register.name for register in frame.architecture().registers()}
        for name in sorted((names | _UNLISTED_REGISTERS) - {"rip", "rsp"}):
            # A machine may lack some of those that its architecture has.
            with contextlib.suppress(gdb.error, ValueError):
                info.add_saved_register(name, frame.read_register(name))
        caller_pc, caller_sp = site.end, int(sp)
        if site.is_call:
            caller_pc = int.from_bytes(read_memory(caller_sp, 8), "little")
            caller_sp += 8
        info.add_saved_register("rip", gdb.Value(caller_pc).cast(pc.type))
        info.add_saved_register("rsp", gdb.Value(caller_sp).cast(sp.type))
        return info


class BlockFilter:
    """Names blocks in backtraces."""

    name = "optpoline"
    enabled = True
    priority = 100

    def __init__(self, finder: Finder) -> None:
        """Use a finder."""
        self._finder = finder

    def filter(self, frames: Iterator[FrameDecorator]) -> Iterator[FrameDecorator]:
        """Pass frames on, those in blocks with a name."""
        for frame in frames:
            try:
                block = self._finder.find(int(frame.inferior_frame().pc()))
                name = None if block is None else describe(block)
            except gdb.MemoryError:
                name = None
            yield frame if name is None else _name_frame(frame, name)


def _name_frame(frame: FrameDecorator, name: str) -> FrameDecorator:
    """Return a frame that is shown under another name."""

    class NamedFrame(FrameDecorator):  # type: ignore[misc]  # gdb comes without types
        """One frame in a block."""

        def function(self) -> str:
            """Return the name."""
            return name

    return NamedFrame(frame)


def register() -> None:
    """Make all of this known to gdb; loaded again, it takes the place of what was."""
    from gdb.unwinder import register_unwinder

    finder = Finder()
    register_unwinder(None, BlockUnwinder(finder), replace=True)
    gdb.frame_filters[BlockFilter.name] = BlockFilter(finder)
    for events in (gdb.events.new_objfile, gdb.events.clear_objfiles, gdb.events.exited):
        events.connect(finder.forget)


def _load_apart() -> None:
    """Load this file as a module: what gdb sources shares one namespace with all else it sources.

    Otherwise another script's function of some name would take the place of ours.
    """
    spec = importlib.util.spec_from_file_location("optpoline_gdb", __file__)
    if spec is None or spec.loader is None:
        raise ImportError(f"cannot load {__file__}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    module.register()


if __name__ == "__main__":
    _load_apart()
