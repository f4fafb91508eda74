// SPDX-License-Identifier: Apache-2.0
// Two sites that name one table, of two branches at most, and a call that must be left alone; all
// results are checked. Prints "ready"; each line sent is answered; at the end prints "wrong N".
#include <stdio.h>
#include <pthread.h>

#include "optpoline.h"

typedef int filter(int);
#define FILTER(n) static __attribute__((noinline)) int f##n(int x) { return x * (2 * n + 3) + n; }
FILTER(0) FILTER(1) FILTER(2) FILTER(3)
static filter *const filters[4] = {f0, f1, f2, f3};
static int expected(int n, int x) { return x * (2 * n + 3) + n; }

DYNAMIC_CALL_TABLE_BRANCHES(handlers, 2, int, int);

static volatile int stopping;
static volatile long wrong;

#define NOINLINE __attribute__((noinline))
static NOINLINE int first(filter *f, int x) { return dynamic_call(handlers, f, x) + 1; }
static NOINLINE int second(filter *f, int x) { return dynamic_call(handlers, f, x) - 1; }
static NOINLINE __attribute__((no_optpoline)) int quiet(filter *f, int x) { return f(x) + 2; }

static void *work(void *unused)
{
    for (int i = 0; !stopping; i++) {
        int n = i % 4, x = i & 0xffff;
        wrong += first(filters[n], x) != expected(n, x) + 1;
        wrong += second(filters[n], x) != expected(n, x) - 1;
        wrong += quiet(filters[n], x) != expected(n, x) + 2;
    }
    return unused;
}

int main(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, work, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin))
        puts("ok");
    stopping = 1;
    pthread_join(thread, NULL);
    printf("wrong %ld\n", wrong);
    return wrong != 0;
}
