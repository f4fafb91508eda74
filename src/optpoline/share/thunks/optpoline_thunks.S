/* SPDX-License-Identifier: Apache-2.0
 *
 * Thunks for code built with -mindirect-branch=thunk-extern (GCC) or -mretpoline-external-thunk
 * (Clang). Link this file into each program and shared library: `optpoline ldflags` names it. It
 * is assembly and nothing else, so any compiler takes it, with any flags.
 *
 * Which form they have is chosen when the program starts, by the environment variable
 * OPTPOLINE_THUNKS, and is in force before any code of the program runs:
 *
 *   retpoline   the CPU cannot speculate past it (also if the variable is not set, or wrong)
 *   lfence      `lfence; jmp *reg`: cheaper; AMD once recommended it, and no longer does
 *   plain       `jmp *reg`: for CPUs whose hardware protects indirect branches
 *
 * Programs that gain privileges when executed (setuid) do not look at it. Where the system does
 * not let code be changed, they stay retpolines.
 *
 * All thunks are hidden: each module has its own, and calls need no procedure linkage table,
 * whose jump would be an indirect one again.
 */

/* Bytes from one thunk to the next: what the longest form takes, and a power of two. */
#define SLOT 32
/* They have pages of their own, for while these are written nothing there can be executed. */
#define PAGE 4096
#define PROT_READ 1
#define PROT_WRITE 2
#define PROT_EXEC 4

        .macro  retpoline reg
        .cfi_startproc
        call    2f
1:      pause
        lfence
        jmp     1b
        .cfi_adjust_cfa_offset 8
2:      mov     %\reg, (%rsp)
        ret
        int3                            /* no speculation straight past it */
        .cfi_endproc
        .endm

        .macro  lfence_jump reg
        lfence
        jmp     *%\reg
        int3
        .endm

        .macro  plain_jump reg
        jmp     *%\reg
        int3
        .endm

        .macro  each do:vararg
        .irp    reg, rax, rbx, rcx, rdx, rsi, rdi, rbp, r8, r9, r10, r11, r12, r13, r14, r15
        .balign SLOT, 0xcc
        \do     \reg
        .endr
        .endm

        .macro  named_retpoline reg
        .globl  __x86_indirect_thunk_\reg
        .hidden __x86_indirect_thunk_\reg
        .type   __x86_indirect_thunk_\reg, @function
__x86_indirect_thunk_\reg:
        retpoline \reg
        .size   __x86_indirect_thunk_\reg, . - __x86_indirect_thunk_\reg
        .endm

        .section .text.optpoline.thunks, "ax", @progbits
        .balign PAGE, 0xcc
.Lthunks:
        each    named_retpoline
        .balign SLOT, 0xcc
.Lthunks_end:
        .balign PAGE, 0xcc

        .section .rodata.optpoline.thunks, "a", @progbits
        .balign SLOT
.Lof_lfence:
        each    lfence_jump
        .balign SLOT, 0xcc
.Lof_plain:
        each    plain_jump
        .balign SLOT, 0xcc
.Lvariable:
        .asciz  "OPTPOLINE_THUNKS"
.Llfence:
        .asciz  "lfence"
.Lplain:
        .asciz  "plain"

        .text
        .type   optpoline_choose_thunks, @function
optpoline_choose_thunks:
        .cfi_startproc
        push    %rbx                    /* the form that was chosen; and this aligns the stack */
        .cfi_adjust_cfa_offset 8
        .cfi_rel_offset %rbx, 0
        lea     .Lvariable(%rip), %rdi
        call    secure_getenv@PLT
        test    %rax, %rax
        jz      9f

        lea     .Lof_lfence(%rip), %rbx
        mov     %rax, %rsi
        lea     .Llfence(%rip), %rdi
        mov     $7, %ecx                /* with the 0 at its end */
        repe    cmpsb
        je      5f
        lea     .Lof_plain(%rip), %rbx
        mov     %rax, %rsi
        lea     .Lplain(%rip), %rdi
        mov     $6, %ecx
        repe    cmpsb
        jne     9f

5:      lea     .Lthunks(%rip), %rdi
        mov     $PAGE, %esi
        mov     $(PROT_READ | PROT_WRITE), %edx
        call    mprotect@PLT
        test    %eax, %eax
        jnz     9f
        lea     .Lthunks(%rip), %rdi
        mov     %rbx, %rsi
        mov     $(.Lthunks_end - .Lthunks), %ecx
        rep     movsb
        lea     .Lthunks(%rip), %rdi
        mov     $PAGE, %esi
        mov     $(PROT_READ | PROT_EXEC), %edx
        call    mprotect@PLT
        test    %eax, %eax
        jz      9f
        ud2                             /* what is not executable now would be executed next */

9:      pop     %rbx
        .cfi_adjust_cfa_offset -8
        .cfi_restore %rbx
        ret
        .cfi_endproc
        .size   optpoline_choose_thunks, . - optpoline_choose_thunks

        /* 101: before all constructors that are not the system's. */
        .section .init_array.00101, "aw", @init_array
        .balign 8
        .quad   optpoline_choose_thunks

        .section .note.GNU-stack, "", @progbits
