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
    iced_x86.FlowControl.EXCEPTION,
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


_UD1 = b"\x0f\xb9\x3d"
"""ud1 disp32(%rip), %edi: capstone takes the first two bytes for all of it."""


def _undefined(code: bytes, addr: int, off: int) -> Insn:
    """Return a ud1 with its operand, as the CPU decodes it."""
    disp = int.from_bytes(code[off + 3 : off + 7], "little", signed=True)
    return Insn(
        off=off,
        size=7,
        mnemonic="ud1l",
        text=f"{disp:#x}(%rip), %edi",
        branch_addr=None,
        memory_addr=addr + off + 7 + disp,
        writes=(),
        is_indirect=False,
    )


def _whole(name: str) -> str:
    """Return the 64-bit register that a register of 32 bits is the low half of."""
    if name.startswith("e") and name != "eflags":
        return f"r{name[1:]}"
    return name[:-1] if name.startswith("r") and name.endswith("d") else name


def _capstone(code: bytes, addr: int) -> list[Insn]:
    """Disassemble with capstone."""
    decoder = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    decoder.detail = True
    decoder.syntax = capstone.CS_OPT_SYNTAX_ATT
    found: list[Insn] = []
    off = 0
    while off < len(code):
        if code[off : off + len(_UD1)] == _UD1:
            found.append(_undefined(code, addr, off))
            off += found[-1].size
        end = code.find(_UD1, off)
        n_found = len(found)
        part = code[off:end] if end > 0 else code[off:]
        found += [_converted(insn, addr) for insn in decoder.disasm(part, addr + off)]
        off += sum(insn.size for insn in found[n_found:])
        if n_found == len(found):
            break
    return found


def _converted(insn: capstone.CsInsn, addr: int) -> Insn:
    """Return what capstone knows of an instruction."""
    branches = insn.group(capstone.CS_GRP_JUMP) or insn.group(capstone.CS_GRP_CALL)
    direct = branches and insn.operands[0].type == capstone.x86.X86_OP_IMM
    relative = [
        op.mem.disp + insn.address + insn.size
        for op in insn.operands
        if op.type == capstone.x86.X86_OP_MEM and op.mem.base == capstone.x86.X86_REG_RIP
    ]
    written = [_whole(insn.reg_name(register)) for register in insn.regs_access()[1]]
    return Insn(
        off=insn.address - addr,
        size=insn.size,
        mnemonic=insn.mnemonic,
        text=insn.op_str,
        branch_addr=insn.operands[0].imm if direct else None,
        memory_addr=relative[0] if relative else None,
        writes=tuple(name for name in written if name not in ("rflags", "rip", "eflags")),
        is_indirect=bool(branches and not direct) or insn.group(capstone.CS_GRP_RET),
    )


_PLAIN_MNEMONICS = ("cmp", "inc", "mov", "sub", "add", "and", "lea", "lsl", "shl")
_MNEMONICS = {f"{name}{size}": name for name in _PLAIN_MNEMONICS for size in "lq"}
_MNEMONICS |= {"lock bts": "bts", "lock btsq": "bts", "lock xadd": "xadd", "lock xaddq": "xadd"}
_MNEMONICS |= {"lock incq": "inc", "lock inc": "inc", "btsq": "bts", "xaddq": "xadd"}
_MNEMONICS |= {"ud1l": "ud1"}


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
