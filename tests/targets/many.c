// SPDX-License-Identifier: Apache-2.0
// One site and 1,024 functions, checking every result. Prints "ready". Each line on standard
// input sets how many of the functions are called (in an order that looks random), and is
// answered with "ok ROUNDS"; at its end prints "wrong N rounds N".
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * 0x##n + 3) + 0x##n; }
#define F16(m, n) m(n##0) m(n##1) m(n##2) m(n##3) m(n##4) m(n##5) m(n##6) m(n##7) \
    m(n##8) m(n##9) m(n##a) m(n##b) m(n##c) m(n##d) m(n##e) m(n##f)
#define F256(m, n) F16(m, n##0) F16(m, n##1) F16(m, n##2) F16(m, n##3) F16(m, n##4) F16(m, n##5) \
    F16(m, n##6) F16(m, n##7) F16(m, n##8) F16(m, n##9) F16(m, n##a) F16(m, n##b) F16(m, n##c) \
    F16(m, n##d) F16(m, n##e) F16(m, n##f)
F256(F, 0) F256(F, 1) F256(F, 2) F256(F, 3)
#define NAME(n) f##n,
static const function functions[1024] = {F256(NAME, 0) F256(NAME, 1) F256(NAME, 2) F256(NAME, 3)};

static volatile unsigned n_used = 2;
static volatile int stopping;
static volatile uint64_t rounds, wrong;

static void *work(void *unused) {
    uint64_t x = 1;
    uint32_t random = 1;
    while (!stopping) {
        for (unsigned i = 0; i < 4096; i++) {
            random = random * 1664525 + 1013904223;
            unsigned n = (random >> 16) % n_used;
            uint64_t y = functions[n](x);
            if (y != x * (2 * n + 3) + n) wrong++;
            x = y;
        }
        rounds++;
    }
    return unused;
}

int main(void) {
    pthread_t thread;
    pthread_create(&thread, NULL, work, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        unsigned n = (unsigned)atoi(line);
        n_used = n < 1 ? 1 : n > 1024 ? 1024 : n;
        printf("ok %lu\n", (unsigned long)rounds);
    }
    stopping = 1;
    pthread_join(thread, NULL);
    printf("wrong %lu rounds %lu\n", (unsigned long)wrong, (unsigned long)rounds);
    return wrong != 0;
}
