# SPDX-License-Identifier: Apache-2.0
"""What can be wrong with a block, and what must be known to tell.

Also what a redirected head looks like. The judge itself is ``block_rules``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import Enum

from optpoline.model import Addr, CounterRows, OperandLoad
from optpoline.x86.assembler import INT3, JMP32_OPCODE, JMP32_SIZE
from optpoline.x86.blocks import HEAD_SIZE

__all__ = ["BlockFault", "BlockRule", "BlockScene", "BlockVerdict", "decode_redirect"]


class BlockRule(Enum):
    """What a block must not do or have; the value is shown to users."""

    HEAD = "its head cannot be redirected by one store"
    INDIRECT_BRANCH = "it has an indirect branch"
    CALL = "it has a call"
    STACK = "it uses the stack"
    REGISTER_WRITE = "it writes a register"
    UNKNOWN_INSN = "it has an instruction that no block has"
    OPERAND = "it compares another register than its thunk branches to"
    REBASE = "it does not give the operand back as it was"
    LITERAL = "it compares with something that is neither literal nor counter"
    COUNTER = "it counts outside the counters"
    FLAGS = "it branches on flags that it has not set"
    EXIT = "it branches where the operand may not point"
    ARENA = "it branches into an arena"
    SPECULATION = "it has no int3 behind a jump"
    FALL_OUT = "control runs out of it, or into an int3"
    STRAY = "it has code that nothing leads to"
    DESCRIPTOR = "what is behind its code is no descriptor of a restartable sequence in it"
    SECTION = "it is not disturbed only where its restartable sequences say"
    RESTORE = "it leaves a register or rseq_cs changed"
    LOAD = "it does not begin by loading what its site branches to"


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockFault:
    """One rule broken at one instruction."""

    rule: BlockRule
    addr: Addr


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockScene:
    """What is around a block.

    Attributes:
        thunk_addrs: The thunk of the site it is for; several if a journal has several
            baselines of that site, because its module was replaced.
        operand: The register that thunk branches to; None if its body does not tell.
        load: What the site's blocks and its thunk begin with, where its target is in memory.
        literals: First address of the literals, and the address after them.
        counters: Likewise for the counters.
        read_literal: Returns the u64 at an aligned address of the literals.
        is_code: Tells whether the program can execute an address, arenas left out.
        is_arena: Tells whether an address is in an arena.
        text_size: Bytes of instructions, at its begin; None if it is nothing else.
        rows: What it counts in; None for a block that counts nothing but misses, which
            may do less.
        is_below_stack_free: Whether what lies below the stack pointer is dead where the
            block is entered: its site is a call.
    """

    thunk_addrs: frozenset[Addr]
    operand: str | None
    literals: tuple[int, int]
    counters: tuple[int, int]
    read_literal: Callable[[int], int]
    is_code: Callable[[int], bool]
    is_arena: Callable[[int], bool]
    text_size: int | None = None
    rows: CounterRows | None = None
    is_below_stack_free: bool = False
    load: OperandLoad | None = None

    @property
    def miss_addrs(self) -> frozenset[int]:
        """Where a block may leave that knows nothing about the operand: behind the thunk's load."""
        size = 0 if self.load is None else self.load.size
        return frozenset(addr + size for addr in self.thunk_addrs)


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockVerdict:
    """What was found.

    Attributes:
        faults: Rules broken, in address order.
        stale: What it branches to that is no code any more (of an unloaded module): only
            an operand that points there is led there, and the thunk of a site that is gone.
    """

    faults: tuple[BlockFault, ...]
    stale: tuple[Addr, ...]


def decode_redirect(now: bytes, head: bytes, addr: Addr) -> Addr | None:
    """Return where a redirected head leads; None if its bytes are no redirection.

    Args:
        now: The first ``HEAD_SIZE`` bytes of the block as they are.
        head: The same as encoded; those behind the jump and its int3 must be kept.
        addr: The block.

    >>> hex(decode_redirect(bytes.fromhex("e9fb0f0000cc5678"), bytes(6) + b"Vx", Addr(0x1000)))
    '0x2000'
    """
    kept = JMP32_SIZE + 1
    is_jump = now[:1] == JMP32_OPCODE and now[JMP32_SIZE:kept] == bytes((INT3,))
    if not is_jump or now[kept:] != head[kept:HEAD_SIZE]:
        return None
    disp = int.from_bytes(now[1:JMP32_SIZE], "little", signed=True)
    return Addr(addr + JMP32_SIZE + disp)
