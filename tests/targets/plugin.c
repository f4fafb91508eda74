// SPDX-License-Identifier: Apache-2.0
// A shared object with retpoline sites: plugin_work(N) makes N rounds and returns how many
// were wrong.
#include <stdint.h>

typedef uint64_t (*function)(uint64_t);
#define F(n) \
    static __attribute__((noinline)) uint64_t f##n(uint64_t x) { return x * (2 * n + 5) + n; }
F(0) F(1) F(2) F(3)
static const function functions[4] = {f0, f1, f2, f3};

static __attribute__((noinline)) uint64_t tail(function f, uint64_t x) { return f(x ^ 1); }

uint64_t plugin_work(uint64_t n) {
    uint64_t x = (uint64_t)(uintptr_t)&n, wrong = 0;
    for (uint64_t i = 0; i < n; i++) {
        unsigned k = (unsigned)i & 1;
        uint64_t y = functions[k](x);
        wrong += y != x * (2 * k + 5) + k;
        uint64_t z = tail(functions[k + 2], y);
        wrong += z != (y ^ 1) * (2 * (k + 2) + 5) + k + 2;
        x = z;
    }
    return wrong;
}
