// SPDX-License-Identifier: Apache-2.0
// Indirect branches of every kind, for the GCC plugin to mark. A line that has one says "site", and
// the function it is in by optimised code. Runs as a program too: its status is 0 if all is well.

struct ops {
    int (*plain)(struct ops *, int);
    void (*quiet)(void) __attribute__((no_optpoline));
    long (*loud)(char *, ...) __attribute__((optpoline(4)));
};
typedef int (*quiet_type)(int) __attribute__((no_optpoline));
struct typed {
    quiet_type quiet;
} __attribute__((optpoline));
struct __attribute__((no_optpoline)) silent {
    int (*call)(int);
};

static int increment(int i) { return i + 1; }
static int method(struct ops *ops, int i) { return ops ? i + 2 : 0; }
static void nothing(void) {}
static long variadic(char *text, ...) { return text[0]; }

typedef int number;
int (*table[4])(number) = {increment, increment, increment, increment};
int (*loud_table[4])(int) __attribute__((optpoline(7))) = {increment, increment, increment, increment};

int field(struct ops *ops) { return ops->plain(ops, 1) + 1; }         // site
int tail(struct ops *ops) { return ops->plain(ops, 2); }              // site
void quiet_field(struct ops *ops) { ops->quiet(); nothing(); }        // site
long loud_field(struct ops *ops) { return 2 * ops->loud("a", 1, 2.0); } // site
int quiet_typedef(struct typed *typed) { return 1 + typed->quiet(3); } // site
int quiet_struct(struct silent *silent) { return 1 + silent->call(3); } // site
int array(int i) { return table[i](i) + 1; }                          // site
int loud_array(int i) { return loud_table[i](i) + 1; }                // site
int quiet_parameter(int i, int (*call)(int) __attribute__((no_optpoline)))
{
    int (*copy)(int) = call;
    return copy(i) + 1; // site
}
static inline __attribute__((always_inline)) int inlined(struct ops *ops)
{
    return ops->plain(ops, 3) + 1; // site
}
__attribute__((no_optpoline)) int quiet_function(int i)
{
    return table[i](i) + loud_table[i](i) + 1; // site
}
int has_inlined(struct ops *ops) { return inlined(ops) + 1; }
__attribute__((optpoline(2))) int loud_function(int i) { return table[i](i) - 1; } // site
__attribute__((cold)) int cold_function(int i) { return table[i](i) - 2; }     // site
__attribute__((constructor)) void set_up(void) { table[1](2); nothing(); }    // site
__attribute__((section(".init.text"))) int start_up(int i) { return table[i](i) - 3; } // site
int many_arguments(int (*call)(int, int, int, int, int, int, int, int), int i)
{
    return call(i, 2, 3, 4, 5, 6, 7, 8) + call(8, 7, 6, 5, 4, 3, 2, i) + 1; // site
}
static int sum(int a, int b, int c, int d, int e, int f, int g, int h)
{
    return a + b + c + d + e + f + g + h;
}
int computed(const unsigned char *codes)
{
    static void *labels[] = {&&one, &&two, &&end};
    int result = 0;
    goto *labels[*codes++]; // site
one:
    result += 1;
    goto *labels[*codes++]; // site
two:
    result += 2;
    goto *labels[*codes++]; // site
end:
    return result;
}
int chosen(int i, int (*call)(int))
{
    switch (i) {
    case 0: return call(1) + 2; // site
    case 1: return 5;
    case 2: return 99;
    case 3: return 77;
    case 4: return 1000;
    case 5: return 12345;
    case 6: return i * 8;
    default: return 0;
    }
}

int main(void)
{
    struct ops ops = {method, nothing, variadic};
    struct typed typed = {increment};
    struct silent silent = {increment};
    int total = field(&ops) + tail(&ops) + (int)loud_field(&ops) + quiet_typedef(&typed);
    quiet_field(&ops);
    total += quiet_struct(&silent) + array(1) + loud_array(1) + quiet_parameter(1, increment);
    total += quiet_function(1) + has_inlined(&ops) + loud_function(1) + cold_function(1);
    total += start_up(1) + many_arguments(sum, 1) + computed((const unsigned char *)"\0\1\1\2");
    total += chosen(0, increment) + chosen(5, increment);
    return total != 12660;
}
