/* SPDX-License-Identifier: Apache-2.0 */
/* Jump sites with labels behind which the flags are dead, or live. Each function
 * is one case; the file is read, never run. */

        .text
        .globl  _start
        .type   _start, @function
_start:
        .irp function, dead_labels, live_label, live_carry, live_shift, live_lea, cold_parent, live_cold
        call    \function               /* tells a function from a cold part */
        .endr
        call    live_call
        ret
        .size   _start, . - _start

        .macro FUNCTION name
        .p2align 4
        .type   \name, @function
\name:
        .cfi_startproc
        .endm

        .macro END name
        .cfi_endproc
        .size   \name, . - \name
        .endm

        /* Compare, then jump through a table: the flags differ at the labels. */
        .macro DISPATCH table
        lea     \table(%rip), %rcx
        mov     (%rcx,%rdi,8), %rax
        cmp     $1, %rdi
        jmp     __x86_indirect_thunk_rax
        .endm

FUNCTION dead_labels
        DISPATCH dead_table
dead_1: xor     %eax, %eax
        ret
dead_2: mov     $5, %eax                /* moves touch no flag */
        lea     1(%rax), %rax
        jmp     dead_3
dead_3: mov     (%rcx,%rdi,8), %rax
        jmp     __x86_indirect_thunk_rax
END dead_labels

FUNCTION live_label
        DISPATCH live_table
live_1: xor     %eax, %eax
        ret
live_2: mov     $5, %eax
        setb    %al
        ret
END live_label

/* inc leaves CF alone; the loop is followed once. */
FUNCTION live_carry
        DISPATCH carry_table
carry_1:
        inc     %rax
        jmp     carry_2
        nop
carry_2:
        adc     $0, %rax
        ret
END live_carry

/* A shift by a count that may be zero writes no flag. */
FUNCTION live_shift
        DISPATCH shift_table
shift_1:
        shl     %cl, %rax
        sete    %al
        ret
END live_shift

/* The label's address is taken by an instruction only. */
FUNCTION live_lea
        lea     lea_1(%rip), %rax
        cmp     $1, %rdi
        jmp     __x86_indirect_thunk_rax
lea_1:  sete    %al
        ret
END live_lea

/* The label lies in another part of the function. */
FUNCTION cold_parent
        DISPATCH cold_table
        jmp     cold_parent.cold
END cold_parent

FUNCTION cold_parent.cold
        xor     %eax, %eax
        ret
#ifdef LIVE_COLD
cold_1: sete    %al
#else
cold_1: xor     %eax, %eax
#endif
        ret
END cold_parent.cold

/* The label goes on to another part of the function, which reads the flags. */
FUNCTION live_cold
        DISPATCH live_cold_table
live_cold_1:
        mov     %rdi, %rax
        jmp     live_cold.cold
END live_cold

FUNCTION live_cold.cold
        sete    %al
        ret
END live_cold.cold

/* Nobody calls it, but its address is taken: a function, so its label is its own. */
FUNCTION live_taken
        DISPATCH taken_table
taken_1:
        sete    %al
        ret
END live_taken

/* A call needs no flags, wherever labels are. */
FUNCTION live_call
        lea     call_1(%rip), %rax
        cmp     $1, %rdi
        call    __x86_indirect_thunk_rax
call_1: sete    %al
        ret
END live_call

        .p2align 4
no_function:
        jmp     __x86_indirect_thunk_rax

        .p2align 12
        .skip   4096 - 3, 0x90
FUNCTION_page_crossing:
        call    __x86_indirect_thunk_rax

FUNCTION pushed_target
        push    %rdi
        jmp     __x86_indirect_thunk
END pushed_target

/* In a section of their own, so that branches to them are not made short. */
        .section .text.thunks, "ax", @progbits
        .p2align 4
        .type   __x86_indirect_thunk_rax, @function
__x86_indirect_thunk_rax:
        .cfi_startproc
        call    1f
2:      pause
        lfence
        jmp     2b
1:      mov     %rax, (%rsp)
        ret
        .cfi_endproc
        .size   __x86_indirect_thunk_rax, . - __x86_indirect_thunk_rax

        .p2align 4
        .type   __x86_indirect_thunk, @function
__x86_indirect_thunk:
        .cfi_startproc
        call    1f
2:      pause
        lfence
        jmp     2b
1:      lea     8(%rsp), %rsp
        ret
        .cfi_endproc
        .size   __x86_indirect_thunk, . - __x86_indirect_thunk

        .section .data.rel.ro, "aw", @progbits
        .p2align 3
dead_table:
        .quad   dead_1, dead_2
live_table:
        .quad   live_1, live_2
carry_table:
        .quad   carry_1
shift_table:
        .quad   shift_1
live_cold_table:
        .quad   live_cold_1
taken_table:
        .quad   taken_1, live_taken
cold_table:
        .quad   cold_1

        .section .note.GNU-stack, "", @progbits
