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

/* A thunk that goes on to another one is no site. In a section of its own, so that
 * the jump is not made short. */
        .section .text.onward, "ax", @progbits
        .globl  __llvm_retpoline_r11
        .type   __llvm_retpoline_r11, @function
__llvm_retpoline_r11:
        jmp     __x86_indirect_thunk_r11
        .size   __llvm_retpoline_r11, . - __llvm_retpoline_r11

        .section .note.GNU-stack, "", @progbits
