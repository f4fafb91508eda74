// SPDX-License-Identifier: Apache-2.0
// What the two units of the program share: two functions that do the same, and a static call.
#include "optpoline.h"

typedef unsigned long function(unsigned long);
function first, hot;
DECLARE_STATIC_CALL(elsewhere, first);
