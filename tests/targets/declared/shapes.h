/* SPDX-License-Identifier: Apache-2.0 */
/* What both units of the declared project share; C and C++ alike. */
#ifndef SHAPES_H
#define SHAPES_H

#include "optpoline.h"

#ifdef __clang__
#define NOINLINE __attribute__((noinline))
#else
#define NOINLINE __attribute__((noipa))
#endif

#ifdef __cplusplus
extern "C" {
#endif
int codec_v1(int value);
int codec_v2(int value);
void on_event(int value);
int other_unit(int value);
#ifdef __cplusplus
}
#endif

DECLARE_STATIC_KEY_FALSE(trace);
DECLARE_STATIC_KEY_TRUE(checks);
DECLARE_STATIC_CALL(codec, codec_v1);
DECLARE_STATIC_CALL(hook, on_event);
DECLARE_STATIC_CALL(quota, codec_v1);

DYNAMIC_CALL_TABLE(handle, int, int);
DYNAMIC_CALL_TABLE_BRANCHES(fold, 3, long, long, int, const char *);

#ifdef __cplusplus
/* In C++ both units have this, and one is linked, with one set of notes. */
template <typename Number> NOINLINE Number shared(Number value)
{
    if (static_branch_unlikely(&trace))             /* @branch trace nop C++ */
        return -value;
    return Number(static_call(codec)(int(value)));  /* @call codec C++ */
}
#define SHARED(value) (shared<int>(value) > 1000)
#else
#define SHARED(value) 0
#endif

#endif
