// SPDX-License-Identifier: Apache-2.0
// What the other units use: the static call, the key, and a dynamic call.
#include "project.h"

DEFINE_STATIC_CALL(codec, plain);
STATIC_CALL_TARGET(codec, doubled);
DEFINE_STATIC_KEY_FALSE(trace);

int plain(int value) { return value; }
int doubled(int value) { return 2 * value; }

int filter(int (*how)(int), int value)
{
    return dynamic_call(filters, how, value) + 1;
}
