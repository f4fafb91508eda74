/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that check what a transaction promises, over many keys and static calls.
 *
 * A controller numbers its transactions from 1 on; the generation of a site is the number of the
 * transaction that made it as it is. In generation g every call returns g % 8, and key i is
 * enabled if bit i % 3 of g is set. What is checked, without knowing what the controller does:
 *
 *   order   a site that is executed after somebody has seen generation g is of generation g or
 *           newer: what was seen before is read first, and is published only after its execution.
 *           The controller begins no transaction before somebody has seen the one before it, so
 *           what is executed is at most one ahead of what was seen after it. A thread that was
 *           kept from running in between for several transactions cannot tell; that is counted
 *   view    between optpoline_read_begin and optpoline_read_end all sites are of one generation
 *
 * Two threads are busy, one yields, one sleeps. Commands: an empty line asks for the counts, "hold" makes
 * another thread stay between the two until "go". */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <stdatomic.h>
#include <stdio.h>
#include <string.h>
#include <time.h>

#include "optpoline.h"

#define NOINLINE __attribute__((noipa))
#define N_THREADS 4
#define GENERATIONS 8
#define BITS 3

#define TEN(X, n) X(n##0) X(n##1) X(n##2) X(n##3) X(n##4) X(n##5) X(n##6) X(n##7) X(n##8) X(n##9)
#ifdef MANY /* 50 keys and 50 calls */
#define EACH(X) TEN(X, 1) TEN(X, 2) TEN(X, 3) TEN(X, 4) TEN(X, 5)
#else /* 10 and 10 */
#define EACH(X) TEN(X, 1)
#endif

static NOINLINE int generation0(void) { return 0; }
static NOINLINE int generation1(void) { return 1; }
static NOINLINE int generation2(void) { return 2; }
static NOINLINE int generation3(void) { return 3; }
static NOINLINE int generation4(void) { return 4; }
static NOINLINE int generation5(void) { return 5; }
static NOINLINE int generation6(void) { return 6; }
static NOINLINE int generation7(void) { return 7; }

#define DEFINE(i)                                                                                  \
    DEFINE_STATIC_KEY_FALSE(key##i);                                                               \
    DEFINE_STATIC_CALL(call##i, generation0);                                                      \
    STATIC_CALL_TARGET(call##i, generation1);                                                      \
    STATIC_CALL_TARGET(call##i, generation2);                                                      \
    STATIC_CALL_TARGET(call##i, generation3);                                                      \
    STATIC_CALL_TARGET(call##i, generation4);                                                      \
    STATIC_CALL_TARGET(call##i, generation5);                                                      \
    STATIC_CALL_TARGET(call##i, generation6);                                                      \
    STATIC_CALL_TARGET(call##i, generation7);
EACH(DEFINE)

static atomic_ulong newest, rounds[N_THREADS], order_broken, view_broken, not_told;
static atomic_int is_holding, must_hold;

/* What a call returned after `before` was read: say which generation that is, 0 if that cannot
 * be told. */
static unsigned long see(unsigned long before, int returned)
{
    unsigned long known = atomic_load(&newest);
    unsigned long ahead = ((unsigned long)returned - before) % GENERATIONS;
    unsigned long seen = before + ahead;
    if (known - before >= GENERATIONS / 2 - 1) {
        atomic_fetch_add(&not_told, 1);
        return 0;
    }
    if (ahead >= GENERATIONS / 2) {
        atomic_fetch_add(&order_broken, 1);
        return 0;
    }
    while (known < seen && !atomic_compare_exchange_weak(&newest, &known, seen))
        ;
    return seen;
}

static int is_enabled(unsigned long generation, int key) { return generation >> key % BITS & 1; }

/* What a key was after `before` was read: is there a generation since in which it is that? */
static NOINLINE void check_key(unsigned long before, int key, int enabled)
{
    unsigned long last = see(before, static_call(call10)());
    for (; before <= last; before++)
        if (is_enabled(before, key) == enabled)
            return;
    if (!last)
        return;
    atomic_fetch_add(&order_broken, 1);
}

static NOINLINE void check_order(void)
{
    unsigned long before;
    int enabled;
#define CHECK_ORDER(i)                                                                             \
    before = atomic_load(&newest);                                                                 \
    see(before, static_call(call##i)());                                                           \
    before = atomic_load(&newest);                                                                 \
    enabled = 0;                                                                                   \
    if (static_branch_unlikely(&key##i))                                                           \
        enabled = 1;                                                                               \
    check_key(before, i, enabled);
    EACH(CHECK_ORDER)
}

static NOINLINE void check_view(void)
{
    int first, is_broken = 0;
    optpoline_read_begin();
    first = static_call(call10)();
#define CHECK_VIEW(i)                                                                              \
    is_broken |= static_call(call##i)() != first;                                                  \
    if (static_branch_likely(&key##i))                                                             \
        is_broken |= !is_enabled(first, i);                                                        \
    else                                                                                           \
        is_broken |= is_enabled(first, i);
    EACH(CHECK_VIEW)
    optpoline_read_end();
    atomic_fetch_add(&view_broken, is_broken);
}

static void *run(void *argument)
{
    long number = (long)argument;
    struct timespec pause = {0, 20000};
    for (;;) {
        check_order();
        check_view();
        atomic_fetch_add(&rounds[number], 1);
        if (number == 2)
            sched_yield();
        if (number == 3)
            nanosleep(&pause, 0);
    }
    return 0;
}

static void *hold(void *argument)
{
    struct timespec pause = {0, 1000000};
    optpoline_read_begin();
    atomic_store(&is_holding, 1);
    while (atomic_load(&must_hold))
        nanosleep(&pause, 0);
    optpoline_read_end();
    atomic_store(&is_holding, 0);
    return argument;
}

int main(void)
{
    char line[16];
    pthread_t thread;
    for (long i = 0; i < N_THREADS; i++)
        pthread_create(&thread, 0, run, (void *)i);
    puts("ready");
    fflush(stdout);
    while (fgets(line, sizeof line, stdin)) {
        unsigned long all = 0, least = -1UL;
        if (!strcmp(line, "hold\n")) {
            atomic_store(&must_hold, 1);
            pthread_create(&thread, 0, hold, 0);
            while (!atomic_load(&is_holding))
                sched_yield();
        }
        if (!strcmp(line, "go\n")) {
            atomic_store(&must_hold, 0);
            pthread_join(thread, 0);
        }
        for (int i = 0; i < N_THREADS; i++) {
            unsigned long one = atomic_load(&rounds[i]);
            all += one;
            least = one < least ? one : least;
        }
        printf("newest=%lu rounds=%lu least=%lu order=%lu view=%lu not_told=%lu at=%lu\n",
               atomic_load(&newest), all, least, atomic_load(&order_broken),
               atomic_load(&view_broken), atomic_load(&not_told), (unsigned long)&newest);
        fflush(stdout);
    }
    return 0;
}
