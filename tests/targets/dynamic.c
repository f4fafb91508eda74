// SPDX-License-Identifier: Apache-2.0
// Two sites that name one table, of two branches at most, and a call that must be left alone; all
// results are checked. Prints "ready"; each line sent is answered; at the end prints "wrong N".
// From the line "sleep" until "wake" a thread sleeps in a call that must not be interrupted: a
// write to a full pipe, half done.
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <string.h>
#include <sys/ioctl.h>
#include <unistd.h>

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

static int ends[2];
static char data[1 << 21];
static pthread_t writer;

static void *write_all(void *unused)
{
    wrong += write(ends[1], data, sizeof data) != sizeof data;
    return unused;
}

static void fall_asleep(void)
{
    wrong += pipe(ends) != 0;
    pthread_create(&writer, NULL, write_all, NULL);
    for (int n = 0, size = fcntl(ends[0], F_GETPIPE_SZ); n < size; ioctl(ends[0], FIONREAD, &n))
        ;
}

static void wake_up(void)
{
    for (size_t n = 0; n < sizeof data;) {
        ssize_t size = read(ends[0], data, sizeof data - n);
        wrong += size <= 0;
        n += (size_t)size;
    }
    pthread_join(writer, NULL);
}

int main(void)
{
    pthread_t thread;
    pthread_create(&thread, NULL, work, NULL);
    setvbuf(stdout, NULL, _IOLBF, 0);
    puts("ready");
    char line[64];
    while (fgets(line, sizeof line, stdin)) {
        if (!strcmp(line, "sleep\n"))
            fall_asleep();
        if (!strcmp(line, "wake\n"))
            wake_up();
        puts("ok");
    }
    stopping = 1;
    pthread_join(thread, NULL);
    printf("wrong %ld\n", wrong);
    return wrong != 0;
}
