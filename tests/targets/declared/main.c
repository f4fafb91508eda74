/* SPDX-License-Identifier: Apache-2.0 */
/* Declares everything there is to declare, uses it, and exits with 0 if all of it does what
 * plain C would. Compiled as C and as C++; tests compare the notes with the @ marks. With an
 * argument it says what it computes, for tests that have changed it: "say" once, "serve" for
 * each line that it is sent. */
#include <stdio.h>

#include "shapes.h"

static int local_codec(int value) { return value + 30; }
static int events;
void on_event(int value) { events += value; }

DEFINE_STATIC_KEY_FALSE(trace);                     /* @key trace off */
DEFINE_STATIC_KEY_TRUE(checks);                     /* @key checks on */
DEFINE_STATIC_CALL(codec, codec_v1);                /* @static_call codec */
DEFINE_STATIC_CALL(local, local_codec);             /* @static_call local */
DEFINE_STATIC_CALL_NULL(hook, on_event);            /* @static_call hook */
DEFINE_STATIC_CALL_RET0(quota, codec_v1);           /* @static_call quota */
STATIC_CALL_TARGET(codec, codec_v2);                /* @target codec */
STATIC_CALL_TARGET(hook, on_event);                 /* @target hook */

NOINLINE int branches(int value)
{
    int sum = value;
    if (static_branch_unlikely(&trace))             /* @branch trace nop */
        sum += 1000;
    if (static_branch_likely(&trace))               /* @branch trace jump */
        sum += 2000;
    if (static_branch_unlikely(&checks))            /* @branch checks jump */
        sum += 10;
    if (static_branch_likely(&checks))              /* @branch checks nop */
        sum += 20;
    return sum;
}

NOINLINE int calls(int value)
{
    static_call(hook)(value);                       /* @call hook */
    return static_call(codec)(value)                /* @call codec */
        + static_call(local)(value) * 2             /* @call local */
        + static_call(quota)(value);                /* @call quota */
}

NOINLINE int tail(int value)
{
    return static_call(codec)(value);               /* @call codec */
}

typedef int handler(int);
struct shape { void *unused; handler *handle; };

NOINLINE int dynamic(struct shape *shape, int value)
{
    return dynamic_call(handle, shape->handle, value) + 1;   /* @dynamic_call handle */
}

NOINLINE int nested(handler *outer, handler *inner, int value)
{
    return dynamic_call(handle, outer,              /* @dynamic_call handle clang+2 */
                        /* its argument, made first */
                        dynamic_call(handle, inner, value)) - 1; /* @dynamic_call handle */
}

NOINLINE long folded(long (*fold)(long, int, const char *), const char *text)
{
    return dynamic_call(fold, fold, 5L, 6, text);   /* @dynamic_call fold */
}

static long fold_text(long a, int b, const char *text) { return a * b + text[0]; }

NOINLINE int bracketed(int value)
{
    int result;
    optpoline_read_begin();
    optpoline_read_begin();
    result = calls(value) + branches(value);
    optpoline_read_end();
    optpoline_read_end();
    return result;
}

/* Nothing calls it: dropped by --gc-sections, its notes as well. */
int unused(int value)
{
    if (static_branch_unlikely(&trace))             /* @branch trace nop unused */
        value += static_call(codec)(value);         /* @call codec unused */
    return value;
}

static void say(void)
{
    int called, switched;
    events = 0;
    called = calls(1);
    switched = branches(1);
    printf("%d %d %d %d %d\n", switched, called, tail(5), events, other_unit(1));
    fflush(stdout);
}

static void serve(void)
{
    int letter;
    puts("ready");
    fflush(stdout);
    while ((letter = getchar()) != EOF)
        if (letter == '\n')
            say();
}

int main(int argc, char **argv)
{
    struct shape shape = {0, codec_v2};
    int good;
    if (argc > 1) {
        if (argv[1][1] == 'a')
            say();
        else
            serve();
        return 0;
    }
    good = branches(1) == 31;
    good &= calls(1) == (1 + 1) + 2 * 31 + 0 && events == 0;
    good &= tail(5) == 6;
    good &= dynamic(&shape, 1) == 4;
    good &= nested(local_codec, codec_v2, 0) == 31;
    good &= folded(fold_text, "A") == 95;
    good &= bracketed(1) == 64 + 31;
    good &= static_key_enabled(&checks) && !static_key_enabled(&trace);
    good &= other_unit(1) + SHARED(1) == 105;
    return !good;
}
