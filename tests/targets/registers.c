// SPDX-License-Identifier: Apache-2.0
// Branches through memory that leave few registers free: arguments of all kinds, a static chain,
// results in registers and in memory, gotos with many values alive. Its status is 0 if all is well.
#include <stdarg.h>

#define OWN __attribute__((noipa))
struct pair { long low, high; };
struct large { long words[5]; };
struct operations {
    long (*six)(long, long, long, long, long, long);
    long (*nine)(long, long, long, long, long, long, long, long, double);
    double (*variadic)(int, ...);
    struct pair (*both)(long);
    struct large (*in_memory)(long, long);
    long (*chained)(long);
    long (*saving)(long) __attribute__((no_caller_saved_registers));
};

static OWN long six(long a, long b, long c, long d, long e, long f)
{
    return a + 2 * b + 3 * c + 5 * d + 7 * e + 11 * f;
}
static OWN long nine(long a, long b, long c, long d, long e, long f, long g, long h, double i)
{
    return six(a, b, c, d, e, f) + 13 * g + 17 * h + (long)(i * 2);
}
static OWN double variadic(int n, ...)
{
    va_list list;
    double sum = 0;
    va_start(list, n);
    while (n--)
        sum = sum * 2 + va_arg(list, double);
    va_end(list);
    return sum;
}
static OWN struct pair both(long x) { return (struct pair){x * 3, x * 5}; }
static OWN struct large in_memory(long x, long y) { return (struct large){{x, y, x + y, x * y, 7}}; }
static OWN __attribute__((no_caller_saved_registers, target("general-regs-only"))) long
saving(long x)
{
    return x * 9;
}
// Adds its static chain, which it is given in r10.
long chained(long);
__asm__(".pushsection .text\nchained:\n\tleaq (%rdi,%r10), %rax\n\tret\n\t.popsection\n");

OWN long call_six(struct operations *o, long x)
{
    return o->six(x, x + 1, x + 2, x + 3, x + 4, x + 5) + x;
}
OWN long call_nine(struct operations *o, long x)
{
    return o->nine(x, 2, 3, 4, 5, x, 7, 8, 1.5 * x) - x;
}
OWN double call_variadic(struct operations *o, double x) { return o->variadic(3, x, 2 * x, 0.25) + x; }
OWN long call_both(struct operations *o, long x)
{
    struct pair pair = o->both(x);
    return pair.low * 2 + pair.high + x;
}
OWN long call_in_memory(struct operations *o, long x)
{
    struct large large = o->in_memory(x, 3);
    return large.words[0] + large.words[1] + large.words[2] + large.words[3] + large.words[4];
}
OWN long call_chained(struct operations *o, long x, void *chain)
{
    return __builtin_call_with_static_chain(o->chained(x), chain) + x;
}
OWN long call_saving(struct operations *o, long x) { return o->saving(x) + x; }
OWN long tail_six(struct operations *o, long x) { return o->six(1, 2, 3, 4, x, x); }

#define ALIVE "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f), "+r"(g), "+r"(codes)
#define NEXT __asm__ volatile("" : ALIVE::"memory"); goto *labels[*codes++]
OWN long few_free(const unsigned char *codes, long a, long b, long c, long d, long e)
{
    static void *labels[] = {&&one, &&two, &&three, &&end};
    long f = a ^ b, g = c ^ d;
    NEXT;
one:
    a += b;
    c -= f;
    NEXT;
two:
    b ^= c + g;
    d += e;
    NEXT;
three:
    e = e * 3 + a;
    f += d;
    g -= e;
    NEXT;
end:
    return a + 3 * b + 5 * c + 7 * d + 11 * e + 13 * f + 17 * g;
}

// What it calls leaves most registers alone, and the compiler knows: it keeps values in them.
static __attribute__((noinline)) long leaf(const unsigned char *codes)
{
    static void *labels[] = {&&one, &&two, &&end};
    long a = 1;
    __asm__ volatile("" : "+r"(a), "+r"(codes)::"memory");
    goto *labels[*codes++];
one:
    a = a * 2;
    __asm__ volatile("" : "+r"(a), "+r"(codes)::"memory");
    goto *labels[*codes++];
two:
    a = a + 3;
    __asm__ volatile("" : "+r"(a), "+r"(codes)::"memory");
    goto *labels[*codes++];
end:
    return a;
}
OWN long keep(const unsigned char *codes, const long *from)
{
    long a = from[0], b = from[1], c = from[2], d = from[3], e = from[4], f = from[5], g = from[6];
    long h = from[7], i = from[8], j = from[9], k = from[10];
    __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f), "+r"(g));
    __asm__ volatile("" : "+r"(h), "+r"(i), "+r"(j), "+r"(k));
    long found = leaf(codes);
    __asm__ volatile("" : "+r"(a), "+r"(b), "+r"(c), "+r"(d), "+r"(e), "+r"(f), "+r"(g));
    __asm__ volatile("" : "+r"(h), "+r"(i), "+r"(j), "+r"(k));
    return found + a + b * 2 + c * 3 + d * 4 + e * 5 + f * 6 + g * 7 + h * 8 + i * 9 + j * 10 + k * 11;
}

int main(void)
{
    struct operations o = {six, nine, variadic, both, in_memory, chained, saving};
    const unsigned char codes[] = {0, 1, 2, 2, 1, 0, 0, 2, 1, 3};
    long total = call_six(&o, 4) + call_nine(&o, 6) + (long)(8 * call_variadic(&o, 3.5));
    total = 3 * total + call_both(&o, 9) + call_in_memory(&o, 11) + tail_six(&o, 5);
    total = 3 * total + call_chained(&o, 7, (void *)100) + call_saving(&o, 12);
    total = 3 * total + few_free(codes, 1, 2, 3, 4, 5);
    const unsigned char few[] = {0, 1, 1, 0, 2};
    const long from[] = {1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11};
    total = 3 * total + keep(few, from);
    return total != 82494;
}
