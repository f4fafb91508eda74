/* SPDX-License-Identifier: Apache-2.0 */
/* Thunk bodies that GCC 12 does not emit, and every form of branch to them.
 * Nothing here has a name or unwind information that would help: strip it, and
 * only the bodies tell. The program is read, never run. */

        .text
        .globl  _start
_start:
        ret

        .p2align 4
caller:
        call    padded_r11              /* e8 */
        .byte   0x2e                    /* cs */
        call    padded_r11              /* 2e e8 */
        test    %eax, %eax
        je      padded_r11              /* 0f 84 */
        .byte   0x2e
        jne     kernel_rax              /* 2e 0f 85 */
        call    lfence_r9
        call    lfence_rcx
        jmp     padded_r11              /* e9 */

        .p2align 4
decoy:
        /* The bytes of "call lfence_rcx" inside the immediate of a movabs. */
        .byte   0x48, 0xb8, 0xe8
        .long   lfence_rcx - (. + 4)
        .byte   0, 0, 0
        ret

        .p2align 4
returns:
        call    return_thunk            /* no site: returns by way of a STACK body */
        jmp     return_thunk

/* In a section of their own, so that branches to them are not made short. */
        .section .text.thunks, "ax", @progbits

/* Clang: padding before the load. */
        .p2align 4
padded_r11:
        call    1f
2:      pause
        lfence
        jmp     2b
        .p2align 4, 0xcc
1:      mov     %r11, (%rsp)
        ret

/* Linux 6: int3 instead of the loop. */
        .p2align 4
kernel_rax:
        call    1f
        int3
1:      mov     %rax, (%rsp)
        ret
        int3

/* AMD. */
        .p2align 4
lfence_r9:
        lfence
        jmp     *%r9
        .p2align 4
lfence_rcx:
        lfence
        jmp     *%rcx

/* __x86_return_thunk, or __x86_indirect_thunk: the bytes are the same. */
        .p2align 4
return_thunk:
        call    1f
2:      pause
        lfence
        jmp     2b
1:      lea     8(%rsp), %rsp
        ret

        .section .note.GNU-stack, "", @progbits
