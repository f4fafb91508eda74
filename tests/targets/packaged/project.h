// SPDX-License-Identifier: Apache-2.0
// A small project of C and C++ that finds optpoline as its build system finds any library.
#pragma once

#include <optpoline.h>

#ifdef __cplusplus
extern "C" {
#endif

int plain(int value);
int doubled(int value);
int filter(int (*how)(int), int value);
int shapes(int value);

#ifdef __cplusplus
}
#endif

DYNAMIC_CALL_TABLE(filters, int, int);
DECLARE_STATIC_CALL(codec, plain);
DECLARE_STATIC_KEY_FALSE(trace);
