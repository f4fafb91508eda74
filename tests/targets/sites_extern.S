/* SPDX-License-Identifier: Apache-2.0 */
/* A program's own thunks for -mindirect-branch=thunk-extern, as plain jumps. */

        .text
        .macro THUNK reg
        .globl  __x86_indirect_thunk_\reg
        .type   __x86_indirect_thunk_\reg, @function
__x86_indirect_thunk_\reg:
        jmp     *%\reg
        .size   __x86_indirect_thunk_\reg, . - __x86_indirect_thunk_\reg
        .endm

        .irp reg, rax, rcx, rdx, rbx, rbp, rsi, rdi, r8, r9, r10, r11, r12, r13, r14, r15
        THUNK \reg
        .endr

        .section .note.GNU-stack, "", @progbits
