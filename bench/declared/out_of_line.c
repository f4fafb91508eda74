// SPDX-License-Identifier: Apache-2.0
// A static call of the other form than the one in calls.c: each definition says which it has.
#define OPTPOLINE_OUT_OF_LINE
#include "calls.h"

DEFINE_STATIC_CALL(elsewhere, first);
