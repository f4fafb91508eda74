// SPDX-License-Identifier: Apache-2.0
// Calls through pointers in a register, a member and an array, in tail position and not.
// Without DECLARED the calls are what anybody would write; with it they are dynamic calls.
// Nothing about a callee may be known to its caller, or plain calls become direct ones.
// Usage: dynamic_call N [nested].
#include <stdio.h>
#include <stdlib.h>

#include "optpoline.h"

struct operations {
    int (*first)(int);
    int (*second)(int);
};

#ifdef DECLARED
DYNAMIC_CALL_TABLE(handlers, int, int);
#define CALL(pointer, value) dynamic_call(handlers, pointer, value)
#else
#define CALL(pointer, value) (pointer)(value)
#endif

static int add(int value) { return value + 3; }
static int twice(int value) { return 2 * value; }

static int (*array[])(int) = {add, twice};

__attribute__((noipa)) int in_register(int (*call)(int), int value)
{
    return CALL(call, value) + 1;
}

__attribute__((noipa)) int in_member(const struct operations *all, int value)
{
    return CALL(all->second, value) ^ value;
}

__attribute__((noipa)) int in_array(int index, int value)
{
    return CALL(array[index & 1], value);
}

__attribute__((noipa)) int nested(int (*outer)(int), int (*inner)(int), int value)
{
    return CALL(outer, CALL(inner, value)) - value;
}

// C does not say whether the outer pointer is read before the inner call or after it.
__attribute__((noipa)) int nested_members(const struct operations *all, int value)
{
    return CALL(all->first, CALL(all->second, value)) - value;
}

int main(int argc, char **argv)
{
    const int n_calls = argc > 1 ? atoi(argv[1]) : 0;
    const struct operations all = {.first = add, .second = twice};
    unsigned sum = 0;
    for (int i = 0; i < n_calls; i++) {
        if (argc > 2) {
            sum += (unsigned)nested_members(&all, i);
            continue;
        }
        sum += (unsigned)in_register(i % 3 ? add : twice, i);
        sum += (unsigned)in_member(&all, i);
        sum += (unsigned)in_array(i, i);
        sum += (unsigned)nested(add, twice, i);
    }
    printf("%u\n", sum);
    return 0;
}
