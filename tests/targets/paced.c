// SPDX-License-Identifier: Apache-2.0
// Calls and tail calls in an order that is known, 64 of each a millisecond at most.
// Prints "ready". A call to function n of a cycle of four is followed by a tail call to the
// same one. Each line on standard input sets how often a fifth function comes after a
// cycle (0 or 1 times) and is answered with "ok". At its end prints "wrong N".
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <time.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
F(0) F(1) F(2) F(3) F(4)
static const function functions[5] = {f0, f1, f2, f3, f4};
static uint64_t expected(unsigned n, uint64_t x) { return x * (2 * n + 3) + n; }

static volatile unsigned extra;
static volatile int stopping;
static uint64_t wrong;

static __attribute__((noinline)) uint64_t tail(function f, uint64_t x) { return f(x ^ 1); }

static __attribute__((noinline)) void work(uint64_t x, unsigned n_functions) {
    for (unsigned n = 0; n < n_functions; n++) {
        function f = functions[n];
        uint64_t y = f(x);
        wrong += y != expected(n, x);
        x = tail(f, y);
        wrong += x != expected(n, y ^ 1);
    }
}

static void *run(void *unused) {
    const struct timespec pause = {0, 1000000};
    while (!stopping) {
        for (uint64_t round = 0; round < 16; round++) work(round, 4 + extra);
        nanosleep(&pause, NULL);
    }
    return unused;
}

int main(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, run, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        extra = (unsigned)atoi(line) != 0;
        puts("ok");
    }
    stopping = 1;
    pthread_join(thread, NULL);
    printf("wrong %lu\n", (unsigned long)wrong);
    return wrong != 0;
}
