// SPDX-License-Identifier: Apache-2.0
// Virtual calls, and a call that may throw through a landing pad.

#include <memory>
#include <stdexcept>

struct Shape {
    virtual ~Shape() = default;
    virtual int area(int scale) const = 0;
};

struct Square : Shape {
    int area(int scale) const override { return scale * scale; }
};

struct Broken : Shape {
    int area(int scale) const override
    {
        if (scale > 2)
            throw std::runtime_error("broken");
        return scale;
    }
};

__attribute__((noinline)) int measure(const Shape &shape, int scale)
{
    try {
        return shape.area(scale) + 1;
    } catch (const std::exception &) {
        return -1;
    }
}

int main(int argc, char **)
{
    std::unique_ptr<Shape> a(new Square), b(new Broken);
    return measure(*a, argc) + measure(*b, argc + 2) - argc;
}
