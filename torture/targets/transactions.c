/* SPDX-License-Identifier: Apache-2.0 */
/* Threads that check what transactions over 100 keys and calls promise; the tests have 20. */
#define MANY
#include "../../tests/targets/declared/transactions.c"
