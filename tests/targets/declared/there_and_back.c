/* SPDX-License-Identifier: Apache-2.0 */
/* A table of functions, each of which uses a key or a static call in one way, as the selftests
 * of Linux have one. For each line that it is sent it says what every row computes now, "row=value"
 * and so on; what that must be, is known by who has changed them. Compiled as C and as C++. */
#include <ctype.h>
#include <stdarg.h>
#include <stdio.h>

#include "base.h"

#ifdef __clang__
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE __attribute__((noipa))
#endif

/* What the compiler cannot know. */
static volatile int zero = 0, two = 2;

/* ---- keys: own ones, and those of the other unit, by either branch */

DEFINE_STATIC_KEY_FALSE(off);
DEFINE_STATIC_KEY_TRUE(on);

#define KEY_ROWS(key)                                                                              \
    static NOINLINE long key##_likely(void) { return static_branch_likely(&key); }                 \
    static NOINLINE long key##_unlikely(void) { return static_branch_unlikely(&key); }             \
    static NOINLINE long key##_enabled(void) { return static_key_enabled(&key); }
KEY_ROWS(off)
KEY_ROWS(on)
KEY_ROWS(base_off)
KEY_ROWS(base_on)

/* Both sides have work to do, and there is more than one branch. */
static NOINLINE long sides(void)
{
    long sum = two;
    if (static_branch_unlikely(&off))
        sum *= 10;
    else
        sum += 5;
    if (!static_branch_likely(&on))
        sum = -sum;
    return sum;
}

static NOINLINE long both(void) { return static_branch_unlikely(&off) && static_branch_likely(&on); }
static NOINLINE long either(void) { return static_branch_likely(&off) || static_branch_unlikely(&on); }

static NOINLINE long loop(void)
{
    long sum = 0;
    int i;
    for (i = 0; i < 3; i++)
        sum = sum * 10 + (static_branch_unlikely(&off) ? 7 : i);
    return sum;
}

__attribute__((always_inline)) static inline int inlined(int value)
{
    return static_branch_unlikely(&base_off) ? -value : value;
}
static NOINLINE long twice(void) { return inlined(two) * 10 + inlined(two + 1); }

/* ---- static calls: what the result is, and where the call stands */

static int times10(int value) { return value * 10; }
DEFINE_STATIC_CALL(codec, plus1);
STATIC_CALL_TARGET(codec, plus2);
STATIC_CALL_TARGET(codec, times10);

static NOINLINE long value(void) { return static_call(codec)(two) + 100; }
static NOINLINE long nested(void) { return static_call(codec)(static_call(codec)(two)) + 1; }
static NOINLINE int tail(int argument) { return static_call(codec)(argument); }
static NOINLINE long called_tail(void) { return tail(5); }
static NOINLINE int maybe_tail(int argument)
{
    if (argument)
        return static_call(codec)(argument);
    return -1;
}
static NOINLINE long called_maybe_tail(void) { return maybe_tail(two) * 100 + maybe_tail(zero); }
static NOINLINE long pointer(void)
{
    int (*volatile pointer)(int) = static_call(codec);
    return pointer(two);
}
static NOINLINE long called_in_loop(void)
{
    long sum = 0;
    int i;
    for (i = 0; i < 3; i++)
        sum = sum * 100 + static_call(codec)(i);
    return sum;
}
static NOINLINE long base_value(void) { return static_call(base_codec)(two) + 100; }
static NOINLINE int base_tail(int argument) { return static_call(base_codec)(argument); }
static NOINLINE long called_base_tail(void) { return base_tail(5); }
static NOINLINE long bracketed(void)
{
    long found;
    optpoline_read_begin();
    found = static_call(codec)(two) * 10 + static_branch_unlikely(&on);
    optpoline_read_end();
    return found;
}

/* A function of another module. */
DEFINE_STATIC_CALL(letter, tolower);
STATIC_CALL_TARGET(letter, toupper);
static NOINLINE long outside(void) { return static_call(letter)('m' + zero); }

/* Nothing, and no result. */
static void set_to_1(long *place) { *place = 1; }
DEFINE_STATIC_CALL_NULL(hook, set_to_1);
STATIC_CALL_TARGET(hook, set_to_1);

static NOINLINE void hook_tail(long *place) { static_call(hook)(place); }
static NOINLINE long hooked(void)
{
    long place = 5, other = 6;
    static_call(hook)(&place);
    hook_tail(&other);
    return place * 10 + other;
}
static NOINLINE long hooked_by_key(void)
{
    long place = 5;
    if (static_branch_unlikely(&off))
        static_call(hook)(&place);
    return place;
}

/* Zero, of more than 32 bits. */
static long huge(int shift) { return -(1L << shift); }
static const char *text(int index) { return &"text"[index]; }
DEFINE_STATIC_CALL_RET0(size, huge);
STATIC_CALL_TARGET(size, huge);
DEFINE_STATIC_CALL_RET0(name, text);
STATIC_CALL_TARGET(name, text);

static NOINLINE long sized(void) { return static_call(size)(two + 38); }
static NOINLINE long sized_tail(void) { return static_call(size)(two); }
static NOINLINE long named(void)
{
    const char *found = static_call(name)(two);
    return found ? *found : -1;
}

/* Arguments and results of every class: on the stack, in memory, in vector registers, variable. */
static long sum8(long a, long b, long c, long d, long e, long f, long g, long h)
{
    return a + b + c + d + e + f + g + h;
}
static long last8(long a, long b, long c, long d, long e, long f, long g, long h)
{
    return h + 0 * (a + b + c + d + e + f + g);
}
DEFINE_STATIC_CALL(many, sum8);
STATIC_CALL_TARGET(many, last8);
static NOINLINE long of_stack(void) { return static_call(many)(1, 2, 3, 4, 5, 6, 7, two * 4); }

struct triple { long a, b, c; };
static struct triple up(struct triple from)
{
    struct triple made = {from.a + 1, from.b + 1, from.c + 1};
    return made;
}
static struct triple around(struct triple from)
{
    struct triple made = {from.c, from.a, from.b};
    return made;
}
DEFINE_STATIC_CALL(turn, up);
STATIC_CALL_TARGET(turn, around);
static NOINLINE long of_memory(void)
{
    struct triple from = {1, two, 3}, made;
    made = static_call(turn)(from);
    return made.a * 100 + made.b * 10 + made.c;
}

static double half(double value) { return value / 2; }
static double squared(double value) { return value * value; }
DEFINE_STATIC_CALL(curve, half);
STATIC_CALL_TARGET(curve, squared);
static NOINLINE long of_vector(void) { return (long)(static_call(curve)(two * 1.5) * 100); }

static long add_all(int n, ...)
{
    double sum = 0;
    va_list more;
    va_start(more, n);
    while (n--)
        sum += va_arg(more, double);
    va_end(more);
    return (long)sum;
}
static long first_of(int n, ...)
{
    long found;
    va_list more;
    va_start(more, n);
    found = (long)va_arg(more, double);
    va_end(more);
    return found;
}
DEFINE_STATIC_CALL(fold, add_all);
STATIC_CALL_TARGET(fold, first_of);
static NOINLINE long of_variable(void) { return static_call(fold)(3, 1.0 * two, 3.0, 4.0); }

#ifdef __cplusplus
namespace inner {
static long no_throw(long &place) { return ++place; }
static long thrower(long &place) { throw place + 40; }
DEFINE_STATIC_CALL(risky, no_throw);
STATIC_CALL_TARGET(risky, thrower);
struct guard {
    long &left;
    ~guard() { left += 100; }
};
template <typename Number> NOINLINE long caught(Number number)
{
    long place = number;
    try {
        guard one{place};
        long found = static_call(risky)(place);
        return found * 1000 + place;
    } catch (long thrown) {
        return thrown * 1000 + place;
    }
}
static long thrown() { return caught<short>(two); }

/* Between the two branches there is what no jump may pass: an object that is destroyed, another
 * that is made. */
static NOINLINE long scoped()
{
    long sum = 0;
    {
        guard one{sum};
        if (static_branch_unlikely(&off))
            sum += 1;
    }
    const long more = two;
    if (static_branch_likely(&on))
        sum += 10;
    return sum + more;
}
} // namespace inner
#endif

/* ---- the table */

struct row {
    const char *name;
    long (*compute)(void);
};

#define ROW(name) {#name, name}
#define ROWS_OF_KEY(key) ROW(key##_likely), ROW(key##_unlikely), ROW(key##_enabled)

static const struct row rows[] = {
    ROWS_OF_KEY(off), ROWS_OF_KEY(on), ROWS_OF_KEY(base_off), ROWS_OF_KEY(base_on),
    ROW(sides), ROW(both), ROW(either), ROW(loop), ROW(twice), ROW(in_base),
    ROW(value), ROW(nested), ROW(called_tail), ROW(called_maybe_tail), ROW(pointer),
    ROW(called_in_loop), ROW(base_value), ROW(called_base_tail), ROW(bracketed), ROW(outside),
    ROW(hooked), ROW(hooked_by_key), ROW(sized), ROW(sized_tail), ROW(named),
    ROW(of_stack), ROW(of_memory), ROW(of_vector), ROW(of_variable),
#ifdef __cplusplus
    {"thrown", inner::thrown}, {"scoped", inner::scoped},
#endif
};

int main(void)
{
    int letter;
    puts("ready");
    fflush(stdout);
    while ((letter = getchar()) != EOF)
        if (letter == '\n') {
            unsigned i;
            for (i = 0; i < sizeof rows / sizeof *rows; i++)
                printf("%s%s=%ld", i ? " " : "", rows[i].name, rows[i].compute());
            printf("\n");
            fflush(stdout);
        }
    return 0;
}
