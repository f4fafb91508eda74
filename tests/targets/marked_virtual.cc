// SPDX-License-Identifier: Apache-2.0
// Virtual calls and calls of templates, for the GCC plugin to mark; half of them in code that two
// units have. With SECOND it is the other unit. Its status as a program is 0 if all is well.
#include <functional>
#include <stdexcept>

struct shape {
    virtual int area(int) = 0;
    virtual ~shape() {}
};
struct [[gnu::no_optpoline]] silent {
    virtual int area(int) = 0;
    virtual ~silent() {}
};

template <typename Shape> struct measure {
    [[gnu::noinline]] static int of(Shape *shape, int i)
    {
        try {
            return shape->area(i) + 1;
        } catch (const std::runtime_error &) {
            return -1;
        }
    }
};

#ifdef SECOND
int second(shape *one, int i) { return measure<shape>::of(one, i); }
#else
int second(shape *, int);

struct square : shape {
    int area(int i) override
    {
        if (i > 100)
            throw std::runtime_error("too large");
        return i * i;
    }
};
struct hidden : silent {
    int area(int i) override { return i; }
};

int call_silent(silent *one, int i) { return one->area(i) + 1; }
int call_member(shape *one, int (shape::*member)(int), int i) { return (one->*member)(i) + 1; }
int call_wrapped(const std::function<int(int)> &wrapped, int i) { return wrapped(i); }

int main()
{
    square one;
    hidden other;
    int total = measure<shape>::of(&one, 4) + second(&one, 1000) + call_silent(&other, 5);
    total += call_member(&one, &shape::area, 2) + call_wrapped([&](int i) { return i + total; }, 1);
    return total != 17 + -1 + 6 + 5 + 1 + 22;
}
#endif
