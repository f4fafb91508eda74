// SPDX-License-Identifier: Apache-2.0
// A program with a restartable sequence of its own, in which it branches indirectly; it checks
// every result of that and of branches outside.
// Usage: sections. Prints "ready"; at its end prints "wrong N rounds N".
#define _GNU_SOURCE
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <sys/rseq.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
F(0) F(1) F(2) F(3)
static const function functions[4] = {f0, f1, f2, f3};
static volatile int stopping;
static volatile uint64_t rounds, wrong;

static struct rseq *own_area(void) {
    return (struct rseq *)((char *)__builtin_thread_pointer() + __rseq_offset);
}

// The thunk of another compiler, which ours does not emit by itself.
__asm__(".text\n.type __llvm_retpoline_r11, @function\n__llvm_retpoline_r11:\n"
        "call 2f\n1: pause\n lfence\n jmp 1b\n.balign 16\n2: mov %r11, (%rsp)\n ret\n"
        ".size __llvm_retpoline_r11, . - __llvm_retpoline_r11\n");

// Calls a function from inside a sequence, and again if it was aborted.
__attribute__((noinline)) uint64_t call_inside(function f, uint64_t x) {
    struct rseq *area = own_area();
    uint64_t result = x;
    __asm__ volatile(
        ".pushsection __rseq_cs, \"aw\"\n.balign 32\n"
        "3: .long 0, 0\n .quad 1f, 2f - 1f, 4f\n.popsection\n"
        "5: lea 3b(%%rip), %%rcx\n mov %%rcx, 8(%[area])\n"
        "mov %[x], %%rdi\n mov %[f], %%r11\n"
        "1: call __llvm_retpoline_r11\n"
        "mov %%rax, %[result]\n2:\n movq $0, 8(%[area])\n"
        ".pushsection .text.unlikely, \"ax\"\n"
        ".byte 0x0f, 0xb9, 0x3d\n .long 0x53053053\n4: jmp 5b\n.popsection\n"
        : [result] "=&r"(result)
        : [area] "r"(area), [x] "r"(x), [f] "r"(f)
        : "rax", "rcx", "rdx", "rsi", "rdi", "r8", "r9", "r10", "r11", "memory", "cc");
    return result;
}

static void *work(void *unused) {
    uint64_t x = 1;
    while (!stopping) {
        for (unsigned i = 0; i < 4096; i++) {
            unsigned k = (i & 31) == 31 ? (i >> 5) & 3 : (i & 1) * 3;
            uint64_t y = call_inside(functions[k], x);
            if (y != x * (2 * k + 3) + k) wrong++;
            uint64_t z = functions[k](y);
            if (z != y * (2 * k + 3) + k) wrong++;
            x = z;
        }
        rounds++;
    }
    return unused;
}

int main(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, work, NULL);
    puts("ready");
    fflush(stdout);
    while (getchar() != EOF);
    stopping = 1;
    pthread_join(thread, NULL);
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
