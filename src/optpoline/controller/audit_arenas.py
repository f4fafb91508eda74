# SPDX-License-Identifier: Apache-2.0
"""Judge the arenas of a process: rights, block table, blocks, heads, free memory.

Pure but for the literals and thunks that blocks name, which are read when asked for.
"""

from __future__ import annotations

import zlib
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from itertools import pairwise

import numpy as np

from optpoline.controller.audit_report import Fault, FaultKind
from optpoline.controller.audit_scene import (
    ArenaContents,
    BlockSlot,
    CodeMap,
    Finding,
    read_block,
    read_table,
)
from optpoline.controller.left_arenas import LeftArena, is_controller_alive
from optpoline.errors import EncodeRangeError, TargetFault
from optpoline.model import Addr, OperandLoad
from optpoline.patch.layout import (
    ArenaHeader,
    BlockEntry,
    BlockKind,
    BlockState,
    JournalEntry,
)
from optpoline.process.memory import Memory
from optpoline.x86.block_rules import judge_block
from optpoline.x86.block_verdict import BlockRule, BlockScene, BlockVerdict, decode_redirect
from optpoline.x86.blocks import HEAD_SIZE, POISON
from optpoline.x86.plain_branches import decode_plain_branch, encode_plain_thunk
from optpoline.x86.thunks import decode_thunk_body

__all__ = ["ArenaJudge", "judge_rights", "was_killed"]

_THUNK_SIZE = 96
"""Bytes of a thunk read to know it by its body."""
_CELL_SIZE = 8
_CALL32_OPCODE = b"\xe8"
_VALUE_RULES = (BlockRule.EXIT, BlockRule.COUNTER, BlockRule.RESTORE)
"""What a literal decides on: where the operand points, where the rows begin, and what the
operand is to be again."""
_HEAD_TRIES = 5
"""Times that a head is read while it keeps changing."""


def was_killed(header: ArenaHeader) -> bool:
    """Tell whether the controller died at work: it says so when it has let go."""
    return header.controller_start != 0 and not is_controller_alive(header)


def judge_rights(arena: LeftArena, header: ArenaHeader) -> Iterator[Finding]:
    """Find parts that can be written or executed and must not be, and parts that lack."""
    rights = (
        (0, header.code_off, "r--s"),
        (header.code_off, header.counter_off, "r-xs"),
        (header.counter_off, header.size, "rw-s"),
    )
    for part in arena.parts:
        first, last = part.offset, part.offset + part.size
        wanted = [perms for low, high, perms in rights if low <= first and last <= high]
        if wanted != [part.perms]:
            names = wanted[0] if wanted else "parts of different rights"
            sentence = f"the arena's part at {part.start:#x} is {part.perms}, not {names}"
            yield _finding(FaultKind.RIGHTS, part.start, sentence)
    if arena.parts[0].offset or arena.end - arena.start != header.size:
        sentence = f"the arena at {arena.start:#x} is not mapped as a whole"
        yield _finding(FaultKind.ARENA, arena.start, sentence)


def _finding(kind: FaultKind, addr: int, sentence: str, evidence: bytes = b"") -> Finding:
    """Make a finding."""
    return Finding(Fault(kind=kind, address=int(addr), sentence=sentence), evidence)


class ArenaJudge:
    """Judges the arenas of one look.

    Args:
        memory: The program's.
        code_map: What it can execute.
        arenas: Those whose contents could be read.
    """

    def __init__(self, memory: Memory, code_map: CodeMap, arenas: Sequence[ArenaContents]) -> None:
        """Index blocks and thunks."""
        self._memory = memory
        self._code_map = code_map
        self._arenas = arenas
        self._thunks: dict[Addr, set[Addr]] = defaultdict(set)
        self._jumps: set[Addr] = set()
        """Sites that are no call in at least one of their baselines."""
        self._plain: dict[Addr, set[tuple[str, OperandLoad | None]]] = defaultdict(set)
        """Operands of plain sites and what loads them; several where one module after the other was
        loaded there. Their thunks are blocks of their own."""
        self._blocks: dict[Addr, list[BlockEntry]] = defaultdict(list)
        self._literals: dict[int, int] = {}
        self._operands: dict[Addr, str | None] = {}
        self.remarks: list[str] = []
        for contents in arenas:
            for entry in contents.arena.history:
                if entry.opcode_size:
                    self._add_plain(entry)
                    continue
                disp = int.from_bytes(entry.disp, "little", signed=True)
                self._thunks[entry.addr].add(Addr(entry.end + disp))
                if entry.code[entry.disp_off - 1 : entry.disp_off] != _CALL32_OPCODE:
                    self._jumps.add(entry.addr)
            self._add_blocks(contents.blocks())

    def _add_plain(self, entry: JournalEntry) -> None:
        """Note a plain site, if its baseline is one."""
        branch = decode_plain_branch(entry.code)
        operand = None if branch is None else branch.find_operand(entry.loaded, entry.end)
        if branch is None or operand is None:
            return
        self._plain[entry.addr].add(operand)
        if not branch.is_call:
            self._jumps.add(entry.addr)

    def _add_blocks(self, blocks: Iterable[BlockEntry]) -> None:
        """Note blocks that there were at some time during this look."""
        for block in blocks:
            self._blocks[block.addr].append(block)
            if block.kind is BlockKind.THUNK and block.site_addr in self._plain:
                self._thunks[block.site_addr].add(block.addr)

    def read_tables_again(self) -> None:
        """Note the blocks that were made since: something leads where none was known."""
        for contents in self._arenas:
            slots = read_table(self._memory, contents.arena, contents.header)
            self._add_blocks(slot.entry for slot in slots if slot.entry is not None)

    def is_block_of(self, addr: int, site_addr: Addr, *, or_retired: bool = False) -> bool:
        """Tell whether a live block of a site begins at an address."""
        return any(
            block.site_addr == site_addr and (or_retired or block.state is not BlockState.RETIRED)
            for block in self._blocks.get(Addr(addr), ())
        )

    def has_thunk(self, entry: JournalEntry) -> bool:
        """Tell whether the program can execute a site's thunk."""
        if entry.opcode_size:
            return bool(self._thunks.get(entry.addr))
        disp = int.from_bytes(entry.disp, "little", signed=True)
        return self._code_map.is_code(entry.end + disp)

    def judge(self, contents: ArenaContents) -> Iterator[Finding]:
        """Find what is wrong in one arena."""
        yield from judge_rights(contents.arena, contents.header)
        for slot in contents.after:
            if slot.is_damaged:
                yield _finding(
                    FaultKind.TABLE,
                    slot.addr,
                    f"the entry at {slot.addr:#x} of the block table is damaged",
                    slot.raw,
                )
            elif slot.entry is not None:
                yield from self._judge_block(contents, slot, slot.entry)
        yield from self._judge_overlaps(contents)
        yield from self._judge_free(contents)

    # --- blocks

    def _judge_block(
        self, contents: ArenaContents, slot: BlockSlot, block: BlockEntry
    ) -> Iterator[Finding]:
        """Judge one block that is live or retired."""
        off = block.addr - contents.code_start
        name = f"the block at {block.addr:#x} of the site at {block.site_addr:#x}"
        thunks = self._thunks.get(block.site_addr, set())
        end = contents.header.literal_off - contents.header.code_off
        is_inside = 0 <= off < off + block.size <= end and block.text_size <= block.size
        if not is_inside or not thunks:
            why = "lies outside the code" if thunks else "is of a site that no journal tells of"
            yield _finding(FaultKind.TABLE, block.addr, f"{name} {why}", slot.raw)
            return
        now = read_block(self._memory, slot, max(block.size, HEAD_SIZE))
        if now is None:
            return  # freed, or used again: another entry is there by now
        if _is_being_freed(contents, block, now):
            self.remarks.append(f"{name} was being freed when its controller died")
            return
        if block.kind is BlockKind.THUNK:
            operands = self._plain.get(block.site_addr, ())
            if now[: block.size] not in _plain_thunks(operands, block.addr):
                sentence = f"{name} is its thunk, and not the indirect jump that the site was"
                yield _finding(FaultKind.BLOCK, block.addr, sentence, slot.raw)
            return
        if block.state is BlockState.REWRITTEN:
            yield from self._judge_rewritten(contents, block, now[:HEAD_SIZE], name, slot.raw)
            return
        planned = (block.head + now[HEAD_SIZE:])[: block.size]
        is_as_written = zlib.crc32(planned) == block.crc
        verdict, n_literals = self._judge_code(contents, block, planned, thunks)
        if verdict.faults or not is_as_written:
            words = () if is_as_written else ("its bytes are not those that were written",)
            # The same bytes with another literal prove another operand.
            is_literal = is_as_written and n_literals and _has_wrong_values_only(verdict)
            kind = FaultKind.LITERAL if is_literal else FaultKind.BLOCK
            sentence = f"{name}: {'; '.join((*words, *_words(verdict)))}"
            yield _finding(kind, block.addr, sentence, slot.raw)
        yield from self._judge_head(block, now[:HEAD_SIZE], name, slot.raw)

    def _judge_rewritten(
        self,
        contents: ArenaContents,
        block: BlockEntry,
        head: bytes,
        name: str,
        evidence: bytes,
    ) -> Iterator[Finding]:
        """Judge a block of which nothing but the head is in use: it leads on."""
        # Nobody stands between its bytes: those behind the jump may be the old ones or the new.
        if not self._is_redirected(replace(block, head=head), head):
            sentence = f"{name} is being rewritten, and its head leads nowhere else"
            yield _finding(FaultKind.HEAD, block.addr, sentence, evidence)
        elif was_killed(contents.header):
            self.remarks.append(f"{name} was being rewritten when its controller died")

    def _judge_head(
        self, block: BlockEntry, head: bytes, name: str, evidence: bytes
    ) -> Iterator[Finding]:
        """Judge a head, which may lead to a block that was made since the table was read."""
        for _ in range(_HEAD_TRIES):
            if head == block.head or self._is_redirected(block, head):
                return
            self.read_tables_again()
            if self._is_redirected(block, head):
                return
            again = self._memory.read(block.addr, HEAD_SIZE)
            if again == head:
                shown = head.hex(" ")
                sentence = f"{name}: its head is {shown}, no redirection to where it may lead"
                yield _finding(FaultKind.HEAD, block.addr, sentence, evidence)
                return
            head = again

    def _is_redirected(self, block: BlockEntry, head: bytes) -> bool:
        """Tell whether a head leads to the site's thunk or to another block of the site."""
        dst = decode_redirect(head, block.head, block.addr)
        if dst is None:
            return False
        is_retired = block.state is BlockState.RETIRED
        return dst in self._thunks[block.site_addr] or self.is_block_of(
            dst, block.site_addr, or_retired=is_retired
        )

    def _judge_code(
        self, contents: ArenaContents, block: BlockEntry, code: bytes, thunks: set[Addr]
    ) -> tuple[BlockVerdict, int]:
        """Judge a block's code; return the verdict and how many literals it reads."""
        start, header = contents.arena.start, contents.header
        literals: set[int] = set()

        def read_literal(addr: int) -> int:
            literals.add(addr)
            return self._read_literal(addr)

        scene = BlockScene(
            thunk_addrs=frozenset(thunks),
            operand=None,
            literals=(start + header.literal_off, start + header.counter_off),
            counters=(start + header.counter_off, start + header.size),
            rows=header.rows_at(start) if block.kind is BlockKind.COUNTING else None,
            is_below_stack_free=block.site_addr not in self._jumps,
            text_size=block.text_size,
            read_literal=read_literal,
            is_code=self._code_map.is_code,
            is_arena=self._code_map.is_arena,
        )
        verdicts = [
            judge_block(code, block.addr, replace(scene, operand=operand, load=load))
            for operand, load in self._operands_of(block.site_addr, thunks)
        ]
        sound = next((verdict for verdict in verdicts if not verdict.faults), verdicts[-1])
        return sound, len(literals)

    def _read_literal(self, addr: int) -> int:
        """Read a literal, once a look."""
        if addr not in self._literals:
            data = self._memory.read(addr, _CELL_SIZE)
            self._literals[addr] = int.from_bytes(data, "little")
        return self._literals[addr]

    def _operands_of(
        self, site_addr: Addr, thunks: set[Addr]
    ) -> list[tuple[str | None, OperandLoad | None]]:
        """Return the register that a site's thunk branches to, and what loads it there.

        None for a register that cannot be told. Several pairs, of which a block must fit one,
        where one module after the other was loaded there.
        """
        plain = self._plain.get(site_addr, set())
        if len(thunks) == 1 and len(plain) <= 1:
            return [*plain] or [(self._read_operand(next(iter(thunks))), None)]
        return [*(pair for pair in plain if pair[1] is not None), (None, None)]

    def _read_operand(self, thunk_addr: Addr) -> str | None:
        """Return the register that a thunk branches to, None if its body does not tell."""
        if thunk_addr not in self._operands:
            try:
                body = decode_thunk_body(self._memory.read(thunk_addr, _THUNK_SIZE), thunk_addr)
            except TargetFault:
                body = None
            self._operands[thunk_addr] = (body.operand or None) if body is not None else None
        return self._operands[thunk_addr]

    # --- memory

    def _judge_overlaps(self, contents: ArenaContents) -> Iterator[Finding]:
        """Find blocks that lie over each other."""
        blocks = [(slot.entry, slot.raw) for slot in contents.after if slot.entry is not None]
        blocks.sort(key=lambda pair: pair[0].addr)
        for (one, raw), (other, other_raw) in pairwise(blocks):
            if other.addr < one.end:
                sentence = f"the blocks at {one.addr:#x} and {other.addr:#x} overlap"
                yield _finding(FaultKind.TABLE, one.addr, sentence, raw + other_raw)

    def _judge_free(self, contents: ArenaContents) -> Iterator[Finding]:
        """Find code memory of no block that is neither int3 nor zero."""
        code = np.frombuffer(contents.code, dtype=np.uint8)
        is_dirty = (code != POISON) & (code != 0)
        for block in contents.blocks():
            off = max(block.addr - contents.code_start, 0)
            is_dirty[off : max(block.end - contents.code_start, 0)] = False
        offs = np.flatnonzero(is_dirty)
        gaps = _group(offs.tolist(), contents)
        if len(gaps) == 1 and was_killed(contents.header):
            first, _ = gaps[0]
            where = contents.code_start + first
            self.remarks.append(f"the controller died while it wrote a block at {where:#x}")
            return
        for first, last in gaps:
            start, end = contents.code_start + first, contents.code_start + last + 1
            sentence = f"free code memory at {start:#x} to {end:#x} is neither int3 nor zero"
            evidence = contents.code[first : last + 1]
            yield _finding(FaultKind.FREE_MEMORY, start, sentence, evidence)


def _plain_thunks(
    operands: Iterable[tuple[str, OperandLoad | None]], addr: Addr
) -> Iterator[bytes]:
    """Yield what the thunk of a plain site may be at an address."""
    for operand, load in operands:
        with suppress(EncodeRangeError):
            yield encode_plain_thunk(operand, load, addr).code


def _is_being_freed(contents: ArenaContents, block: BlockEntry, now: bytes) -> bool:
    """Tell whether a controller died while it poisoned a retired block."""
    is_dead = block.state is BlockState.RETIRED and was_killed(contents.header)
    return is_dead and now[: block.size] == bytes((POISON,)) * block.size


def _has_wrong_values_only(verdict: BlockVerdict) -> bool:
    """Tell whether all that is wrong is what the operand is compared with, or made of literals."""
    return all(fault.rule in _VALUE_RULES for fault in verdict.faults)


def _words(verdict: BlockVerdict) -> tuple[str, ...]:
    """Return each broken rule once, with the first place where it is."""
    first: dict[str, Addr] = {}
    for fault in verdict.faults:
        first.setdefault(fault.rule.value, fault.addr)
    return tuple(f"{rule} (at {addr:#x})" for rule, addr in first.items())


def _group(offs: Iterable[int], contents: ArenaContents) -> list[tuple[int, int]]:
    """Return (first, last) of the offsets between each two blocks."""
    ends = sorted({int(block.end - contents.code_start) for block in contents.blocks()})
    at = 0
    gaps: dict[int, tuple[int, int]] = {}
    for off in offs:
        while at < len(ends) and ends[at] <= off:
            at += 1
        first, _ = gaps.get(at, (off, off))
        gaps[at] = (first, off)
    return list(gaps.values())
