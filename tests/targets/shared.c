// SPDX-License-Identifier: Apache-2.0
// Two sites of one table: a thread runs "hot" all the time, "cold" runs when asked. "lone" is the
// only site of another table. All results are checked. Prints "ready"; each line is answered:
// "cold": runs "cold" CALLS times, with the targets that "hot" has; "strange": has a thread run it
// with another one, until "quiet". At the end prints "wrong N".
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <unistd.h>

#include "optpoline.h"

enum { CALLS = 1000000 };

#define NOINLINE __attribute__((noinline))
typedef int filter(int);
#define FILTER(n) static NOINLINE int f##n(int x) { return x * (2 * n + 3) + n; }
FILTER(0) FILTER(1) FILTER(2)
static filter *const filters[3] = {f0, f1, f2};
static int expected(int n, int x) { return x * (2 * n + 3) + n; }

DYNAMIC_CALL_TABLE(handlers, int, int);
DYNAMIC_CALL_TABLE(others, int, int);

static volatile int stopping, is_strange;
static volatile long wrong;

static NOINLINE int hot(filter *f, int x) { return dynamic_call(handlers, f, x) + 1; }
static NOINLINE int cold(filter *f, int x) { return dynamic_call(handlers, f, x) - 1; }
static NOINLINE int lone(filter *f, int x) { return dynamic_call(others, f, x) + 2; }

static void *work(void *unused)
{
    for (int i = 0; !stopping; i++) {
        int n = i % 2, x = i & 0xffff;
        wrong += hot(filters[n], x) != expected(n, x) + 1;
        wrong += lone(filters[n], x) != expected(n, x) + 2;
    }
    return unused;
}

static void run_cold(int n, int x)
{
    wrong += cold(filters[n], x) != expected(n, x) - 1;
}

static void *work_strangely(void *unused)
{
    while (!stopping) {
        if (is_strange)
            run_cold(2, 7);
        else
            usleep(1000);
    }
    return unused;
}

int main(void)
{
    pthread_t threads[2];
    pthread_create(&threads[0], NULL, work, NULL);
    pthread_create(&threads[1], NULL, work_strangely, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "cold\n"))
            for (int i = 0; i < CALLS; i++)
                run_cold(i % 2, i & 0xffff);
        is_strange = !strcmp(line, "strange\n");
        puts("ok");
    }
    stopping = 1;
    for (int i = 0; i < 2; i++)
        pthread_join(threads[i], NULL);
    printf("wrong %ld\n", wrong);
    return wrong != 0;
}
