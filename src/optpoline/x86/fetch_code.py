# SPDX-License-Identifier: Apache-2.0
"""Code that the controller runs itself, to take counts away from under a running program.

A counter row of CPU c is written only inside restartable sequences by threads that run on c.
A thread of ours on c that enters such a sequence of its own is one more of them: what it does
commits with one instruction, on c, or starts again. So nothing has to be stopped, and no
priority is needed. Row 0, and rows counted in without rseq, are written with ``lock`` prefix
only; there a locked subtraction of what was read takes away exactly that, whatever is added
meanwhile.

Three functions of the System V ABI, position-independent but for three descriptors (struct
rseq_cs of include/uapi/linux/rseq.h) at the end, which hold absolute addresses::

    u64 take_counts(u64 **cells, u64 *out, u64 n, u32 cpu, long rseq_off, u64 n_aborts)
    u64 free_pairs (u64 **pairs, u64 *out, u64 n, u32 cpu, long rseq_off, u64 n_aborts)
    void subtract  (u64 **cells, u64 *out, u64 n, u64 mask)

The first two answer how many they have dealt with: fewer than n if the thread is not on the
CPU named, or was aborted n_aborts times (a debugger that steps through us). ``out[i]`` is added
to. A *pair* is a claimed target and, 8 bytes on, its count: the count is taken, then the target
is cleared in a second sequence only if the count is still 0; else the count is taken again. So
no count is ever given to another target than the one that was there.
"""

from __future__ import annotations

import struct

__all__ = ["FREE_PAIRS_OFF", "SUBTRACT_OFF", "TAKE_COUNTS_OFF", "assemble_fetch_code"]

TAKE_COUNTS_OFF = 0x00
FREE_PAIRS_OFF = 0x60
SUBTRACT_OFF = 0xE0

_DESCRIPTORS_OFF = 0x100
_DESCRIPTORS = ((0x18, 0x24, 0x3D), (0x78, 0x85, 0xBF), (0x95, 0xAA, 0xBF))
"""(start, end, abort) of each sequence; ``end`` is the address behind its commit."""

_INT3 = b"\xcc"

_TAKE_COUNTS = bytes.fromhex(
    "4531d2"  #                00      xor  r10d, r10d
    "4939d2"  #                03 next:cmp  r10, rdx
    "7444"  #                  06      je   done
    "4e8b1cd7"  #              08      mov  r11, [rdi+r10*8]
    "488d05ed000000"  #        0c      lea  rax, [rip+descriptor 0]
    "6449894008"  #            13      mov  fs:[r8+8], rax            rseq_cs
    "6441394804"  #            18      cmp  fs:[r8+4], ecx            cpu_id
    "7524"  #                  1d      jne  moved
    "31c0"  #                  1f      xor  eax, eax
    "498703"  #                21      xchg [r11], rax                the commit
    "6449c7400800000000"  #    24      mov  qword fs:[r8+8], 0
    "4a0104d6"  #              2d      add  [rsi+r10*8], rax
    "49ffc2"  #                31      inc  r10
    "ebcd"  #                  34      jmp  next
    "0fb93d53300553"  #        36      ud1  edi, [rip+RSEQ_SIG]       the signature
    "4983e901"  #              3d abort:sub r9, 1
    "73c0"  #                  41      jae  next
    "6449c7400800000000"  #    43 moved:mov qword fs:[r8+8], 0
    "4c89d0"  #                4c done:mov  rax, r10
    "c3"  #                    4f      ret
)

_FREE_PAIRS = bytes.fromhex(
    "4531d2"  #                60      xor  r10d, r10d
    "4939d2"  #                63 next:cmp  r10, rdx
    "7466"  #                  66      je   done
    "4e8b1cd7"  #              68      mov  r11, [rdi+r10*8]
    "488d05ad000000"  #        6c take:lea  rax, [rip+descriptor 1]
    "6449894008"  #            73      mov  fs:[r8+8], rax            rseq_cs
    "6441394804"  #            78      cmp  fs:[r8+4], ecx            cpu_id
    "7546"  #                  7d      jne  moved
    "31c0"  #                  7f      xor  eax, eax
    "49874308"  #              81      xchg [r11+8], rax              the commit of the first
    "4a0104d6"  #              85      add  [rsi+r10*8], rax
    "488d05b0000000"  #        89      lea  rax, [rip+descriptor 2]
    "6449894008"  #            90      mov  fs:[r8+8], rax            rseq_cs
    "6441394804"  #            95      cmp  fs:[r8+4], ecx            cpu_id
    "7529"  #                  9a      jne  moved
    "49837b0800"  #            9c      cmp  qword [r11+8], 0
    "75c9"  #                  a1      jne  take
    "49c70300000000"  #        a3      mov  qword [r11], 0            the commit of the second
    "6449c7400800000000"  #    aa      mov  qword fs:[r8+8], 0
    "49ffc2"  #                b3      inc  r10
    "ebab"  #                  b6      jmp  next
    "0fb93d53300553"  #        b8      ud1  edi, [rip+RSEQ_SIG]       the signature
    "4983e901"  #              bf abort:sub r9, 1
    "73a7"  #                  c3      jae  take
    "6449c7400800000000"  #    c5 moved:mov qword fs:[r8+8], 0
    "4c89d0"  #                ce done:mov  rax, r10
    "c3"  #                    d1      ret
)

_SUBTRACT = bytes.fromhex(
    "4531d2"  #                e0      xor  r10d, r10d
    "4939d2"  #                e3 next:cmp  r10, rdx
    "7417"  #                  e6      je   done
    "4e8b1cd7"  #              e8      mov  r11, [rdi+r10*8]
    "498b03"  #                ec      mov  rax, [r11]
    "4821c8"  #                ef      and  rax, rcx
    "f0492903"  #              f2      lock sub [r11], rax
    "4a0104d6"  #              f6      add  [rsi+r10*8], rax
    "49ffc2"  #                fa      inc  r10
    "ebe4"  #                  fd      jmp  next
    "c3"  #                    ff done:ret
)


def assemble_fetch_code(addr: int) -> bytes:
    """Return the code, descriptors included, for where it will be executed.

    Args:
        addr: Its address, 32-byte aligned.
    """
    code = _TAKE_COUNTS.ljust(FREE_PAIRS_OFF, _INT3)
    code = (code + _FREE_PAIRS).ljust(SUBTRACT_OFF, _INT3)
    code = (code + _SUBTRACT).ljust(_DESCRIPTORS_OFF, _INT3)
    for start, end, abort in _DESCRIPTORS:
        # version 0, flags 0, start_ip, post_commit_offset, abort_ip
        code += struct.pack("<IIQQQ", 0, 0, addr + start, end - start, addr + abort)
    return code
