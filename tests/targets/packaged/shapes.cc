// SPDX-License-Identifier: Apache-2.0
// The C++ of the project: a virtual call, which nothing but plugin and thunks know of, and a key.
#include "project.h"

namespace {
struct Shape {
    virtual int corners() const = 0;
};
struct Triangle final : Shape {
    int corners() const override { return 3; }
};
struct Square final : Shape {
    int corners() const override { return 4; }
};
const Triangle triangle;
const Square square;
const Shape *const known[] = {&triangle, &square};
}  // namespace

int shapes(int value)
{
    if (static_branch_unlikely(&trace))
        return -1;
    return static_call(codec)(known[value & 1]->corners()) + 1;
}
