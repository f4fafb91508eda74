// SPDX-License-Identifier: Apache-2.0
// A thread in which no system call can be run, and one that waits for standard input to end.
// Usage: dispatch block|allow|lost on|off. The first thread has its system calls dispatched to
// itself, whose selector blocks or allows them, or it has lost its stack. The other has dispatch
// on, and allows, or off. The first calls functions through a site all the time, or, without a
// stack, does nothing. Prints "ready", and "wrong N rounds N" at its end.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>

#ifndef PR_SET_SYSCALL_USER_DISPATCH
#define PR_SET_SYSCALL_USER_DISPATCH 59
#endif
enum { OFF, ON, ALLOW = 0, BLOCK = 1 };

typedef uint64_t (*function)(uint64_t);
static __attribute__((noinline)) uint64_t triple(uint64_t x) { return x * 3 + 1; }
static __attribute__((noinline)) uint64_t negate(uint64_t x) { return ~x; }
static __attribute__((noinline)) uint64_t call(function f, uint64_t x) { return f(x) + 1; }

static uint64_t rounds, wrong;
static volatile int started, stopping;
static __thread volatile char selector = ALLOW;

static void dispatch(int mode) {
    void *byte = mode == ON ? (void *)&selector : NULL;
    if (prctl(PR_SET_SYSCALL_USER_DISPATCH, mode, 0, 0, byte)) perror("dispatch"), exit(2);
}

static void *read_lines(void *is_dispatched) {
    char line[64];
    while (!started) {}
    if (is_dispatched) dispatch(ON);
    puts("ready");
    while (fgets(line, sizeof line, stdin)) {}
    stopping = 1;
    return NULL;
}

static void run_without_stack(void) {
    started = 1;
    uint64_t n = 0;
    __asm__ volatile("mov %%rsp, %%rbx\n1: xor %%esp, %%esp\ninc %0\ncmpl $0, %1\nje 1b\nmov %%rbx, %%rsp"
                     : "+r"(n) : "m"(stopping) : "rbx", "cc", "memory");
    rounds = n;
}

static void run(void) {
    uint64_t x = 1;
    while (!stopping) {
        for (unsigned i = 0; i < 1024; i++) {
            uint64_t y = i & 3 ? x * 3 + 1 : ~x;
            wrong += call(i & 3 ? triple : negate, x) != y + 1;
            x = y;
        }
        rounds++;
        started = 1;
    }
}

int main(int argc, char **argv) {
    if (argc != 3) return 2;
    setvbuf(stdout, NULL, _IOLBF, 0);
    pthread_t reader;
    pthread_create(&reader, NULL, read_lines, strcmp(argv[2], "on") ? NULL : argv);
    if (!strcmp(argv[1], "lost")) {
        run_without_stack();
    } else {
        dispatch(ON);
        selector = strcmp(argv[1], "block") ? ALLOW : BLOCK;
        run();
        selector = ALLOW;
        dispatch(OFF);
    }
    pthread_join(reader, NULL);
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
