// SPDX-License-Identifier: Apache-2.0
// Calls, tail calls and computed gotos through changing pointers, checking every result.
// Usage: promote [THREADS]. Prints "ready". Each line on standard input sets the phase
// (which targets are hot) and is answered with "ok ROUNDS"; at its end prints
// "wrong N rounds N" and exits with 1 if N wrong is not 0.
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 3) + n; }
F(0) F(1) F(2) F(3) F(4) F(5) F(6) F(7)
static const function functions[8] = {f0, f1, f2, f3, f4, f5, f6, f7};
static uint64_t expected(unsigned n, uint64_t x) { return x * (2 * n + 3) + n; }

// Hot functions of each phase: one, two in turn, four in turn, all eight, another one.
static const unsigned char phases[5][8] = {
    {0, 0, 0, 0, 0, 0, 0, 0}, {1, 2, 1, 2, 1, 2, 1, 2}, {3, 4, 5, 6, 3, 4, 5, 6},
    {0, 1, 2, 3, 4, 5, 6, 7}, {7, 7, 7, 7, 7, 7, 7, 7},
};
static volatile unsigned phase;
static volatile int stopping;
static volatile uint64_t rounds, wrong;

// A tail call: its site is a jmp.
static __attribute__((noinline)) uint64_t tail(function f, uint64_t x) { return f(x ^ 1); }

// A computed goto: its sites are jmps to labels.
static __attribute__((noinline)) uint64_t run(const unsigned char *code, uint64_t x) {
    static const void *const labels[] = {&&add, &&mul, &&xor, &&end};
    goto *labels[*code++];
add:
    x += 7;
    goto *labels[*code++];
mul:
    x *= 3;
    goto *labels[*code++];
xor:
    x ^= 0x55;
    goto *labels[*code++];
end:
    return x;
}

static void *work(void *unused) {
    static const unsigned char codes[3][8] = {
        {0, 1, 0, 1, 2, 0, 1, 3}, {2, 2, 2, 1, 1, 1, 0, 3}, {0, 0, 0, 0, 0, 0, 2, 3}};
    uint64_t x = (uint64_t)(uintptr_t)&unused;
    while (!stopping) {
        for (unsigned i = 0; i < 4096; i++) {
            unsigned n = phases[phase][i & 7];
            function f = functions[n];
            uint64_t y = f(x);
            if (y != expected(n, x)) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
            uint64_t z = tail(f, y);
            if (z != expected(n, y ^ 1)) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
            const unsigned char *code = codes[n % 3];
            uint64_t v = z;
            for (const unsigned char *c = code; *c != 3; c++)
                v = *c == 0 ? v + 7 : *c == 1 ? v * 3 : v ^ 0x55;
            x = run(code, z);
            if (x != v) __atomic_add_fetch(&wrong, 1, __ATOMIC_RELAXED);
        }
        __atomic_add_fetch(&rounds, 1, __ATOMIC_RELAXED);
    }
    return NULL;
}

int main(int argc, char **argv) {
    int n_threads = argc > 1 ? atoi(argv[1]) : 1;
    pthread_t threads[64];
    for (int i = 0; i < n_threads; i++) pthread_create(&threads[i], NULL, work, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        phase = (unsigned)atoi(line) % 5;
        printf("ok %lu\n", (unsigned long)rounds);
    }
    stopping = 1;
    for (int i = 0; i < n_threads; i++) pthread_join(threads[i], NULL);
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
