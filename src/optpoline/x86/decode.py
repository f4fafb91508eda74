# SPDX-License-Identifier: Apache-2.0
"""Read x86-64 text: instructions one by one, and patterns over whole modules.

Two speeds. The functions that start with ``scan_`` look at every byte offset
of a text at once with numpy and find *candidates*: bytes that would be such an
instruction if one began there. The functions that start with ``decode_`` run
the decoder and are the judges: only they know instruction boundaries.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from enum import Enum

import numpy as np
from iced_x86 import Decoder, FlowControl, Formatter, FormatterSyntax, Instruction
from numpy.typing import NDArray

from optpoline.model import Addr

__all__ = [
    "AddrArray",
    "Flow",
    "Insn",
    "TextArray",
    "count_indirect_branches",
    "decode_ending_at",
    "decode_one",
    "decode_range",
    "find_boundaries",
    "is_redirectable",
    "name_operand",
    "plt_entries_before",
    "scan_branches",
    "scan_call_targets",
    "scan_code_pointers",
    "scan_slot_jumps",
]

TextArray = NDArray[np.uint8]
AddrArray = NDArray[np.int64]

MAX_INSN_SIZE = 15
"""Longest x86 instruction in bytes (Intel SDM volume 2, 2.3.11)."""


class Flow(Enum):
    """Where control goes after an instruction."""

    NEXT = "next"
    CALL = "call"
    JUMP = "jump"
    COND_JUMP = "cond_jump"
    INDIRECT_CALL = "indirect_call"
    INDIRECT_JUMP = "indirect_jump"
    RETURN = "return"
    OTHER = "other"
    """Traps, transactions, undefined opcodes and bytes that are no instruction."""


_FLOWS: dict[int, Flow] = {
    FlowControl.NEXT: Flow.NEXT,
    FlowControl.CALL: Flow.CALL,
    FlowControl.UNCONDITIONAL_BRANCH: Flow.JUMP,
    FlowControl.CONDITIONAL_BRANCH: Flow.COND_JUMP,
    FlowControl.INDIRECT_CALL: Flow.INDIRECT_CALL,
    FlowControl.INDIRECT_BRANCH: Flow.INDIRECT_JUMP,
    FlowControl.RETURN: Flow.RETURN,
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Insn:
    """One instruction, as far as finding branches needs it.

    Attributes:
        addr: Its first byte, prefixes included.
        size: Its length in bytes.
        flow: Where control goes after it.
        target: Where a direct branch goes, else None.
    """

    addr: Addr
    size: int
    flow: Flow
    target: Addr | None

    @property
    def end(self) -> Addr:
        """Address after it."""
        return Addr(self.addr + self.size)


def _insn(raw: Instruction) -> Insn:
    """Keep what we need of a decoded instruction."""
    flow = _FLOWS.get(raw.flow_control, Flow.OTHER)
    is_direct = flow in (Flow.CALL, Flow.JUMP, Flow.COND_JUMP)
    return Insn(
        addr=Addr(raw.ip),
        size=raw.len,
        flow=flow,
        target=Addr(raw.near_branch_target) if is_direct else None,
    )


def decode_range(code: bytes, addr: Addr) -> Iterator[Insn]:
    """Yield every instruction of ``code``, in order; bad bytes come as OTHER.

    >>> [(i.addr, i.flow.name, i.target) for i in decode_range(bytes.fromhex("90ebfd"), Addr(16))]
    [(16, 'NEXT', None), (17, 'JUMP', 16)]
    """
    for raw in Decoder(64, code, ip=addr):
        yield _insn(raw)


def decode_one(code: bytes, addr: Addr) -> Insn | None:
    """Decode the instruction at the start of ``code``, or None if there is none."""
    decoder = Decoder(64, code[:MAX_INSN_SIZE], ip=addr)
    raw = decoder.decode()
    return None if raw.is_invalid else _insn(raw)


def decode_ending_at(code: bytes, addr: Addr, ends: Set[int]) -> list[Insn]:
    """Decode from the start of ``code`` and keep what ends at one of ``ends``.

    This is the judge of branch candidates: a candidate whose end is no end of
    an instruction lies inside another one. Decoding stops after the last end.

    Args:
        code: Text that begins at an instruction boundary.
        addr: Address of its first byte.
        ends: Addresses after the instructions wanted.

    Returns:
        The instructions found, in address order; prefixes are part of them.
    """
    if not ends:
        return []
    raws = [raw for raw in Decoder(64, code[: max(ends) - addr], ip=addr) if raw.next_ip in ends]
    return [_insn(raw) for raw in raws if not raw.is_invalid]


def name_operand(code: bytes, addr: Addr) -> str:
    """Return the operand of an indirect branch as an assembler writes it.

    >>> name_operand(bytes.fromhex("2e2eff5310"), Addr(0x1000))
    '*0x10(%rbx)'
    """
    formatter = Formatter(FormatterSyntax.GAS)
    formatter.rip_relative_addresses = True
    formatter.uppercase_hex = False
    return formatter.format_operand(Decoder(64, code, ip=addr).decode(), 0)


def is_redirectable(code: bytes) -> bool:
    """Say whether a branch has a 32-bit displacement and harmless prefixes only.

    Harmless are cs and ds (padding, branch hints) and bnd.

    >>> is_redirectable(bytes.fromhex("2ee800000000")), is_redirectable(bytes.fromhex("eb00"))
    (True, False)
    """
    body = code.lstrip(b"\x2e\x3e\xf2")
    is_near = len(body) == 5 and body[0] in (0xE8, 0xE9)
    return is_near or (len(body) == 6 and body[0] == 0x0F and body[1] & 0xF0 == 0x80)


def find_boundaries(code: bytes, addr: Addr, wanted: Set[int]) -> frozenset[int]:
    """Return those of ``wanted`` at which an instruction of ``code`` begins."""
    if not wanted:
        return frozenset()
    last = max(wanted) - addr + 1
    # One whole instruction more than the last address wanted, so that it is not cut off.
    found = (raw.ip for raw in Decoder(64, code[: last + MAX_INSN_SIZE], ip=addr))
    return frozenset(ip for ip in found if ip in wanted)


def count_indirect_branches(code: bytes, addr: Addr) -> int:
    """Count the plain indirect calls and jumps of a text, decoding all of it."""
    wanted = (FlowControl.INDIRECT_CALL, FlowControl.INDIRECT_BRANCH)
    return sum(1 for raw in Decoder(64, code, ip=addr) if raw.flow_control in wanted)


# --- every offset at once ----------------------------------------------------


def _disps(text: TextArray) -> NDArray[np.int32]:
    """View a text as the signed 32-bit word at each of its offsets."""
    n_words = max(text.size - 3, 0)
    return np.ndarray(shape=(n_words,), dtype="<i4", buffer=text, strides=(1,))


def _rel32_disp_offs(text: TextArray) -> NDArray[np.intp]:
    """Find where the displacement of each would-be call, jmp or jcc rel32 lies."""
    if text.size < 6:
        return np.zeros(0, dtype=np.intp)
    # e8 call, e9 jmp
    near = np.flatnonzero((text[:-4] & 0xFE) == 0xE8) + 1
    # 0f 80..8f jcc
    escape = np.flatnonzero(text[:-5] == 0x0F) + 1
    cond = escape[(text[escape] & 0xF0) == 0x80] + 1
    return np.concatenate((near, cond))


def scan_branches(text: TextArray, base: Addr, targets: AddrArray) -> AddrArray:
    """Find each would-be call, jmp or jcc rel32 that lands on a target.

    Args:
        text: Bytes of the text.
        base: Address of the first.
        targets: Addresses to land on.

    Returns:
        The address after each candidate, sorted; its displacement are the
        four bytes before.
    """
    if targets.size == 0:
        return np.zeros(0, dtype=np.int64)
    disp_offs = _rel32_disp_offs(text)
    ends = disp_offs.astype(np.int64) + (base + 4)
    landing = ends + _disps(text)[disp_offs]
    return np.sort(ends[np.isin(landing, targets)])


def scan_call_targets(text: TextArray, base: Addr) -> AddrArray:
    """Return where each would-be ``call rel32`` of a text lands, unsorted."""
    if text.size < 5:
        return np.zeros(0, dtype=np.int64)
    # e8 call
    offs = np.flatnonzero(text[:-4] == 0xE8) + 1
    landing: AddrArray = offs.astype(np.int64) + (base + 4) + _disps(text)[offs]
    return landing


def scan_slot_jumps(text: TextArray, base: Addr, slots: AddrArray) -> AddrArray:
    """Find each would-be ``jmp [rip+disp32]`` through one of the given slots.

    Returns:
        Address of each candidate's opcode, sorted.
    """
    if slots.size == 0 or text.size < 6:
        return np.zeros(0, dtype=np.int64)
    offs = np.flatnonzero(text[:-5] == 0xFF)
    # ff 25 jmp [rip+disp32]
    offs = offs[text[offs + 1] == 0x25]
    addrs: AddrArray = offs.astype(np.int64) + base
    return addrs[np.isin(addrs + 6 + _disps(text)[offs + 2], slots)]


def plt_entries_before(slot_jumps: AddrArray) -> AddrArray:
    """Return where the PLT entries that end in the given jumps may begin.

    The jump itself, or the bnd prefix or endbr64 before it.
    """
    return np.concatenate([slot_jumps - size for size in (0, 1, 4, 5)])


def _mov_imm_offs() -> NDArray[np.int64]:
    """Tell from the ModRM byte of ``c7 /0`` how far its immediate lies from the opcode."""
    table = np.zeros(256, dtype=np.int64)
    for modrm in range(256):
        mod, reg, rm = modrm >> 6, modrm >> 3 & 7, modrm & 7
        if reg != 0:
            continue  # not a mov
        disp_size = (4 if rm == 5 else 0, 1, 4, 0)[mod]
        has_sib = mod != 3 and rm == 4
        table[modrm] = 2 + has_sib + disp_size
    return table


def scan_code_pointers(text: TextArray, base: Addr, *, with_absolute: bool = True) -> AddrArray:
    """Find where the text itself takes an address, as far as its bytes tell.

    Looks for ``lea reg, [rip+disp32]``, ``lea reg, [disp32]`` and for ``mov``
    and ``push`` of an immediate. More is returned than is meant as a pointer:
    the caller keeps what points to where it is interested in.

    Args:
        text: Bytes of the text.
        base: Address of the first.
        with_absolute: Whether to look at absolute addresses too, not only at
            those relative to rip.

    Returns:
        The addresses, unsorted, with repetitions.
    """
    body = text
    # Zeros behind it, so that no form looked at below runs past the end.
    text = np.concatenate((text, np.zeros(MAX_INSN_SIZE, dtype=np.uint8)))
    words = _disps(text)
    found: list[AddrArray] = []
    # 8d /r lea
    lea = np.flatnonzero(body == 0x8D)
    modrm = text[lea + 1] & 0xC7
    relative = lea[modrm == 0x05]
    found.append(relative.astype(np.int64) + (base + 6) + words[relative + 2])
    if not with_absolute:
        return found[0]
    absolute = lea[(modrm == 0x04) & (text[lea + 2] == 0x25)]
    found.append(words[absolute + 3].astype(np.int64))
    # b8+r mov reg, imm32; with REX.W (48, 49) before it mov reg, imm64
    mov = np.flatnonzero((body & 0xF8) == 0xB8)
    found.append(words[mov + 1].astype(np.int64))
    wide = mov[mov > 0]
    wide = wide[(text[wide - 1] & 0xFE) == 0x48]
    low = words[wide + 1].astype(np.int64) & 0xFFFFFFFF
    found.append(words[wide + 5].astype(np.int64) << 32 | low)
    # 68 push imm32
    push = np.flatnonzero(body == 0x68)
    found.append(words[push + 1].astype(np.int64))
    # c7 /0 mov r/m, imm32
    store = np.flatnonzero(body == 0xC7)
    imm_offs = _mov_imm_offs()[text[store + 1]]
    found.append(words[(store + imm_offs)[imm_offs > 0]].astype(np.int64))
    return np.concatenate(found)
