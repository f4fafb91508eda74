/* SPDX-License-Identifier: Apache-2.0 */
/* The other unit: uses what main.c defines. */
#include "shapes.h"

int codec_v1(int value) { return value + 1; }
int codec_v2(int value) { return value + 2; }

NOINLINE int other_unit(int value)
{
    int sum = 100 + SHARED(value);
    if (static_branch_unlikely(&trace))             /* @branch trace nop */
        sum = 0;
    return sum + static_call(codec)(value) + 3;     /* @call codec */
}
