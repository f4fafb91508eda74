# SPDX-License-Identifier: Apache-2.0
"""Two disassemblers that know nothing of our encoder, or of each other."""

from __future__ import annotations

from dataclasses import dataclass

import capstone
import iced_x86

__all__ = ["Insn", "disassemble"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Insn:
    """One instruction.

    Attributes:
        off: Offset in the block.
        size: Bytes.
        mnemonic: As both disassemblers name it.
        text: Operands as capstone writes them, in AT&T syntax.
        branch_addr: Where a direct branch goes, or None.
        memory_addr: What a rip-relative operand points to, or None.
        writes: Registers that it writes, flags and rip left out.
        is_indirect: Whether its destination is not in its bytes.
    """

    off: int
    size: int
    mnemonic: str
    text: str
    branch_addr: int | None
    memory_addr: int | None
    writes: tuple[str, ...]
    is_indirect: bool


_NAMES = {
    value: name.lower() for name, value in vars(iced_x86.Register).items() if isinstance(value, int)
}
_NEAR_BRANCHES = {iced_x86.OpKind.NEAR_BRANCH64}
_DIRECT_FLOW = {
    iced_x86.FlowControl.NEXT,
    iced_x86.FlowControl.CONDITIONAL_BRANCH,
    iced_x86.FlowControl.UNCONDITIONAL_BRANCH,
    iced_x86.FlowControl.INTERRUPT,
}
_WRITES = {
    iced_x86.OpAccess.WRITE,
    iced_x86.OpAccess.COND_WRITE,
    iced_x86.OpAccess.READ_WRITE,
    iced_x86.OpAccess.READ_COND_WRITE,
}


def _iced(code: bytes, addr: int) -> list[Insn]:
    """Disassemble with iced-x86."""
    formatter = iced_x86.Formatter(iced_x86.FormatterSyntax.GAS)
    info = iced_x86.InstructionInfoFactory()
    found: list[Insn] = []
    for insn in iced_x86.Decoder(64, code, ip=addr):
        assert not insn.is_invalid, f"iced-x86 cannot decode {code.hex()} at {insn.ip:#x}"
        branch = insn.op_count > 0 and insn.op_kind(0) in _NEAR_BRANCHES
        used = info.info(insn).used_registers()
        found.append(
            Insn(
                off=insn.ip - addr,
                size=len(insn),
                mnemonic=formatter.format_mnemonic(insn),
                text="",
                branch_addr=insn.near_branch_target if branch else None,
                memory_addr=insn.ip_rel_memory_address if insn.is_ip_rel_memory_operand else None,
                writes=tuple(_NAMES[u.register] for u in used if u.access in _WRITES),
                is_indirect=insn.flow_control not in _DIRECT_FLOW,
            )
        )
    return found


def _capstone(code: bytes, addr: int) -> list[Insn]:
    """Disassemble with capstone."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    decoder.syntax = capstone.CS_OPT_SYNTAX_ATT
    found: list[Insn] = []
    for insn in decoder.disasm(code, addr):
        branches = insn.group(capstone.CS_GRP_JUMP) or insn.group(capstone.CS_GRP_CALL)
        direct = branches and insn.operands[0].type == capstone.x86.X86_OP_IMM
        relative = [
            op.mem.disp + insn.address + insn.size
            for op in insn.operands
            if op.type == capstone.x86.X86_OP_MEM and op.mem.base == capstone.x86.X86_REG_RIP
        ]
        written = [insn.reg_name(register) for register in insn.regs_access()[1]]
        found.append(
            Insn(
                off=insn.address - addr,
                size=insn.size,
                mnemonic=insn.mnemonic,
                text=insn.op_str,
                branch_addr=insn.operands[0].imm if direct else None,
                memory_addr=relative[0] if relative else None,
                writes=tuple(name for name in written if name not in ("rflags", "rip")),
                is_indirect=bool(branches and not direct) or insn.group(capstone.CS_GRP_RET),
            )
        )
    return found


_MNEMONICS = {
    f"{name}{size}": name for name in ("cmp", "inc", "mov", "sub", "add") for size in "lq"
}


def disassemble(code: bytes, addr: int) -> list[Insn]:
    """Return the instructions of a block, once both disassemblers agree on them.

    Raises:
        AssertionError: if they do not agree, or one cannot decode to the end.
    """
    one, other = _capstone(code, addr), _iced(code, addr)
    assert sum(insn.size for insn in one) == len(code), "capstone stopped early"
    for a, b in zip(one, other, strict=True):
        assert (a.off, a.size) == (b.off, b.size)
        assert _MNEMONICS.get(a.mnemonic, a.mnemonic) == _MNEMONICS.get(b.mnemonic, b.mnemonic)
        assert (a.branch_addr, a.memory_addr) == (b.branch_addr, b.memory_addr)
        assert (a.writes, a.is_indirect) == (b.writes, b.is_indirect)
    return one
