/* SPDX-License-Identifier: Apache-2.0 */
/* The other unit of there_and_back.c: keys and a static call that are used there, as they are
 * here. The static call is out-of-line, whatever those of the rest are. */
#ifndef OPTPOLINE_OUT_OF_LINE
#define OPTPOLINE_OUT_OF_LINE
#endif
#include "base.h"

DEFINE_STATIC_KEY_FALSE(base_off);
DEFINE_STATIC_KEY_TRUE(base_on);
DEFINE_STATIC_CALL(base_codec, plus1);
STATIC_CALL_TARGET(base_codec, plus2);

int plus1(int value) { return value + 1; }
int plus2(int value) { return value + 2; }

long in_base(void)
{
    long found = static_call(base_codec)(10);
    if (static_branch_unlikely(&base_off))
        found += 100;
    if (static_branch_likely(&base_on))
        found += 1000;
    return found;
}
