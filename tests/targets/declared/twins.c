/* SPDX-License-Identifier: Apache-2.0 */
/* Functions with a dynamic call (with_*), and the same with a plain one (plain_*). */
#include "optpoline.h"

typedef int handler(int);
struct shape { void *unused; handler *handle; };

DYNAMIC_CALL_TABLE(handle, int, int);
DYNAMIC_CALL_TABLE(notify, void, void *, double, const char *);

int with_member(struct shape *shape, int value)
{
    return dynamic_call(handle, shape->handle, value) + 1;
}
int plain_member(struct shape *shape, int value) { return shape->handle(value) + 1; }

int with_tail(struct shape *shape, int value) { return dynamic_call(handle, shape->handle, value); }
int plain_tail(struct shape *shape, int value) { return shape->handle(value); }

void with_loop(handler **handlers, int n)
{
    for (int i = 0; i < n; i++)
        dynamic_call(handle, handlers[i], i);
}
void plain_loop(handler **handlers, int n)
{
    for (int i = 0; i < n; i++)
        handlers[i](i);
}

void with_mixed(void (*p)(void *, double, const char *), void *a, double b)
{
    dynamic_call(notify, p, a, b * 2, "text");
    dynamic_call(notify, p, a, b, 0);
}
void plain_mixed(void (*p)(void *, double, const char *), void *a, double b)
{
    p(a, b * 2, "text");
    p(a, b, 0);
}

int with_nested(handler *outer, handler *inner, int value)
{
    return dynamic_call(handle, outer, dynamic_call(handle, inner, value));
}
int plain_nested(handler *outer, handler *inner, int value) { return outer(inner(value)); }
