// SPDX-License-Identifier: Apache-2.0
// Calls, a tail call and computed gotos whose target is in memory, each in another way; all results
// are checked. Prints "ready"; a line that is a number says which targets are taken from then on
// (0: all in turn) and is answered; at the end prints "wrong N".
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define NOINLINE __attribute__((noipa))
#define NEXT __asm__ volatile("" : "+r"(x), "+r"(codes)::"memory"); goto *labels[*codes++]
typedef int operation(int, int);
#define OPERATION(n) static NOINLINE int f##n(int x, int y) { return x * (2 * n + 3) + (y ^ n); }
OPERATION(0) OPERATION(1) OPERATION(2) OPERATION(3)
static int expected(int n, int x, int y) { return x * (2 * n + 3) + (y ^ n); }

struct object {
    long data[2];
    operation *run;
    int number;
};
operation *operations[4] = {f0, f1, f2, f3};
static struct object objects[4] = {{{1, 2}, f0, 0}, {{3, 4}, f1, 1}, {{5, 6}, f2, 2}, {{7, 8}, f3, 3}};
static operation *hook;
static __thread operation *own;

static NOINLINE int by_base(struct object *o, int x, int y) { return o->run(x, y) + o->number; }
static NOINLINE int by_tail(struct object *o, int x, int y) { return o->run(x, y); }
static NOINLINE int by_index(int n, int x, int y) { return operations[n](x, y) + n; }
static NOINLINE int by_global(int n, int x, int y) { return hook(x, y) + n; }
static NOINLINE int by_thread(int n, int x, int y) { return own(x, y) + n; }

static NOINLINE void fill(operation **table, int n)
{
    for (int i = 0; i < 4; i++)
        table[i] = operations[(i + n) & 3];
}
static NOINLINE int by_stack(int n, int x, int y)
{
    operation *table[4];
    fill(table, n);
    return table[0](x, y) + n;
}
static NOINLINE int by_stack_index(int n, int x, int y)
{
    operation *table[4];
    fill(table, 0);
    return table[n](x, y) + n;
}

static NOINLINE long by_goto(const unsigned char *codes, long x)
{
    static void *labels[] = {&&add, &&twice, &&turn, &&end};
    NEXT;
add:
    x += 7;
    NEXT;
twice:
    x *= 2;
    NEXT;
turn:
    x ^= 0x55;
    NEXT;
end:
    return x;
}
static const unsigned char programs[4][5] = {{0, 1, 2, 3}, {1, 1, 0, 3}, {2, 0, 1, 3}, {0, 2, 2, 3}};
static long interpret(const unsigned char *codes, long x)
{
    for (; *codes != 3; codes++)
        x = *codes == 0 ? x + 7 : *codes == 1 ? x * 2 : x ^ 0x55;
    return x;
}

static volatile int stopping, phase;
static volatile long wrong;

static void *work(void *unused)
{
    for (int i = 0; !stopping; i++) {
        int n = phase ? phase & 3 : i % 4, x = i & 0xffff, y = i >> 3;
        int result = expected(n, x, y);
        hook = own = operations[n];
        wrong += by_base(&objects[n], x, y) != result + n;
        wrong += by_tail(&objects[n], x, y) != result;
        wrong += by_index(n, x, y) != result + n;
        wrong += by_global(n, x, y) != result + n;
        wrong += by_thread(n, x, y) != result + n;
        wrong += by_stack(n, x, y) != result + n;
        wrong += by_stack_index(n, x, y) != result + n;
        wrong += by_goto(programs[n], x) != interpret(programs[n], x);
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
    while (fgets(line, sizeof line, stdin)) {
        phase = atoi(line);
        puts("ok");
    }
    stopping = 1;
    pthread_join(thread, NULL);
    printf("wrong %ld\n", wrong);
    return wrong != 0;
}
