# SPDX-License-Identifier: Apache-2.0
"""Find code in a target that lets it run a system call and find its way back.

Two pieces of the target's own text are used and none is changed: a ``syscall``
instruction (every vDSO has one, as the fallback of its clock functions) and an
``rt_sigreturn`` trampoline (every C library has one, behind each handler).
What follows the ``syscall`` up to its ``ret`` is modelled here, so that a stack
can be prepared on which the thread, left to itself, returns to the trampoline.
"""

from __future__ import annotations

from dataclasses import dataclass

from iced_x86 import Decoder, Instruction, Mnemonic, OpKind, Register

__all__ = ["SIGRETURN_CODES", "ReturnPath", "find_return_path"]

SIGRETURN_CODES = (
    # mov rax, 15 ; syscall
    bytes.fromhex("48c7c00f0000000f05"),
    # mov eax, 15 ; syscall
    bytes.fromhex("b80f0000000f05"),
)
"""What an rt_sigreturn trampoline looks like."""

# syscall
_SYSCALL = bytes.fromhex("0f05")
_MAX_INSNS = 32  # a fallback's epilogue has about ten
_HARMLESS = frozenset(
    {
        Mnemonic.MOV, Mnemonic.XOR, Mnemonic.AND, Mnemonic.OR, Mnemonic.TEST, Mnemonic.CMP,
        Mnemonic.MOVSXD, Mnemonic.CDQE, Mnemonic.NEG, Mnemonic.MOVZX, Mnemonic.LEA,
    }
)  # fmt: skip
_NOPS = frozenset({Mnemonic.NOP, Mnemonic.ENDBR64})
_STACK_REGISTERS = frozenset(
    {Register.RSP, Register.ESP, Register.SP, Register.SPL}
    | {Register.RBP, Register.EBP, Register.BP, Register.BPL}
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ReturnPath:
    """A ``syscall`` instruction and how the code behind it comes to its ``ret``.

    Attributes:
        syscall_addr: Address of the instruction.
        code: Bytes from it to the end of the path, to be compared before use.
        from_rbp: Whether the path takes its stack pointer from rbp (``leave``).
        ret_off: Where the return address must lie, in bytes above rsp at the
            ``syscall``, or above rbp there when ``from_rbp``.
        lowest_off: Lowest place the path reads, counted as ret_off is.
    """

    syscall_addr: int
    code: bytes
    from_rbp: bool
    ret_off: int
    lowest_off: int

    def stack_for(self, return_addr_at: int) -> tuple[int, int | None]:
        """Return (rsp, rbp or None) for a return address placed at an address.

        Everything the path pops lies from that rsp up.
        """
        base = return_addr_at - self.ret_off
        return (base + self.lowest_off, base) if self.from_rbp else (base, None)


def find_return_path(code: bytes, addr: int) -> ReturnPath | None:
    """Find a ``syscall`` whose way to ``ret`` can be modelled.

    Straight-line code is followed that pops, moves and computes registers, and
    neither reads nor writes memory otherwise. A path that leaves rbp alone is
    preferred.

    Args:
        code: Text of the vDSO.
        addr: Address of its first byte.
    """
    found: ReturnPath | None = None
    off = code.find(_SYSCALL)
    while off >= 0:
        path = _model_path(code, addr, off)
        if path is not None and not path.from_rbp:
            return path
        found = found or path
        off = code.find(_SYSCALL, off + 1)
    return found


def _model_path(code: bytes, addr: int, off: int) -> ReturnPath | None:
    """Follow the code behind one ``syscall``, or give up with None."""
    start = off + len(_SYSCALL)
    decoder = Decoder(64, code[start:], ip=addr + start)
    from_rbp, sp_off, lowest_off, rbp_kept = False, 0, 0, True
    for _ in range(_MAX_INSNS):
        insn = decoder.decode()
        if insn.is_invalid:
            return None
        match insn.mnemonic:
            case Mnemonic.RET:
                if insn.op_count:
                    return None
                return ReturnPath(
                    syscall_addr=addr + off,
                    code=code[off : insn.next_ip - addr],
                    from_rbp=from_rbp,
                    ret_off=sp_off,
                    lowest_off=min(lowest_off, sp_off),
                )
            case Mnemonic.POP if insn.op0_kind == OpKind.REGISTER:
                if insn.op0_register in _STACK_REGISTERS - {Register.RBP}:
                    return None
                rbp_kept = rbp_kept and insn.op0_register not in _STACK_REGISTERS
                sp_off += 8
            case Mnemonic.LEAVE if rbp_kept:
                from_rbp, sp_off, lowest_off, rbp_kept = True, 8, 0, False
            case Mnemonic.ADD | Mnemonic.SUB if insn.op0_register == Register.RSP:
                if insn.op1_kind in (OpKind.REGISTER, OpKind.MEMORY):
                    return None
                amount = insn.immediate(1)
                amount -= (1 << 64) if amount >> 63 else 0
                sp_off += amount if insn.mnemonic == Mnemonic.ADD else -amount
                lowest_off = min(lowest_off, sp_off)
            case Mnemonic.LEA if insn.op0_register == Register.RSP:
                if insn.memory_base != Register.RBP or insn.memory_index or not rbp_kept:
                    return None
                disp = insn.memory_displacement
                sp_off = disp - ((1 << 64) if disp >> 63 else 0)
                from_rbp, lowest_off = True, sp_off
            case mnemonic if mnemonic in _NOPS:
                continue
            case mnemonic if mnemonic in _HARMLESS and _is_pure(insn):
                continue
            case _:
                return None
    return None


def _is_pure(insn: Instruction) -> bool:
    """Say whether an instruction only computes registers other than rsp and rbp."""
    touches_memory = insn.mnemonic != Mnemonic.LEA and any(
        insn.op_kind(i) == OpKind.MEMORY for i in range(insn.op_count)
    )
    return not touches_memory and insn.op0_register not in _STACK_REGISTERS
