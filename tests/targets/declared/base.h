/* SPDX-License-Identifier: Apache-2.0 */
/* What base.c defines and there_and_back.c uses; C and C++ alike. */
#ifndef BASE_H
#define BASE_H

#include "optpoline.h"

#ifdef __cplusplus
extern "C" {
#endif
int plus1(int value);
int plus2(int value);
long in_base(void);
#ifdef __cplusplus
}
#endif

DECLARE_STATIC_KEY_FALSE(base_off);
DECLARE_STATIC_KEY_TRUE(base_on);
DECLARE_STATIC_CALL(base_codec, plus1);

#endif
