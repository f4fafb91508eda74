# SPDX-License-Identifier: Apache-2.0
# Targets that need, or do not need, the register that led to them (%rax).
	.text
	.globl	_start
_start:
	ret

	.type	__x86_indirect_thunk_rax, @function
__x86_indirect_thunk_rax:
	call	1f
2:	pause
	lfence
	jmp	2b
1:	mov	%rax, (%rsp)
	ret
	.size	__x86_indirect_thunk_rax, . - __x86_indirect_thunk_rax

	.type	__x86_indirect_thunk_rbx, @function
__x86_indirect_thunk_rbx:
	call	1f
2:	pause
	lfence
	jmp	2b
1:	mov	%rbx, (%rsp)
	ret
	.size	__x86_indirect_thunk_rbx, . - __x86_indirect_thunk_rbx

	.globl	dead_at_once
dead_at_once:
	mov	(%rdi), %rax
	ret

	.globl	dead_on_both_ways
dead_on_both_ways:
	test	%rdi, %rdi
	je	1f
	xor	%eax, %eax
	ret
1:	mov	$1, %eax
	ret

	.globl	dead_in_a_loop
dead_in_a_loop:
	dec	%rdi
	jne	dead_in_a_loop
	mov	%rdi, %rax
	ret

	.globl	live_call_of_another_thunk
live_call_of_another_thunk:
	call	__x86_indirect_thunk_rbx
	ret

	.globl	live_on_one_way
live_on_one_way:
	test	%rdi, %rdi
	je	1f
	xor	%eax, %eax
1:	ret

	.globl	live_passed_to_its_thunk
live_passed_to_its_thunk:
	call	__x86_indirect_thunk_rax
	xor	%eax, %eax
	ret

	.globl	live_jump_to_its_thunk
live_jump_to_its_thunk:
	jmp	__x86_indirect_thunk_rax

	.globl	live_jump_to_another_thunk
live_jump_to_another_thunk:
	jmp	__x86_indirect_thunk_rbx

	.globl	live_returned
live_returned:
	mov	%rdi, %rcx
	ret

	.globl	dead_in_what_it_calls
dead_in_what_it_calls:
	call	clears_rax
	ret

clears_rax:
	xor	%eax, %eax
	ret

	.globl	live_across_what_it_calls
live_across_what_it_calls:
	call	leaves_rax_alone
	mov	%rax, (%rdi)
	xor	%eax, %eax
	ret

leaves_rax_alone:
	incq	(%rdi)
	ret

	.section	.note.GNU-stack, "", @progbits
