# SPDX-License-Identifier: Apache-2.0
"""A C program with as many retpoline sites as asked for, all of them in use."""

from __future__ import annotations

__all__ = ["generate_sites"]

_N_TARGETS = 8

_HEAD = """\
/* Generated: {n_sites} indirect call sites, each in a function of its own. */
#include <stdio.h>
#include <time.h>

typedef unsigned long number;
typedef number (*target)(number);
#define KEPT __attribute__((noipa))
"""

_MAIN = """
static long long cpu_ns(void) {{
  struct timespec now;
  clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
  return (long long)now.tv_sec * 1000000000 + now.tv_nsec;
}}

int main(void) {{
  char line[256];
  puts("ready");
  fflush(stdout);
  while (fgets(line, sizeof line, stdin)) {{
    long long begin = cpu_ns();
    number sum = 0;
    for (int i = 0; i < {n_passes}; i++) sum = all_sites(sum);
    printf("%lld %lu\\n", cpu_ns() - begin, sum);
    fflush(stdout);
  }}
  return 0;
}}
"""

_CALLS = 4_000_000
"""Calls in an iteration, over all sites: about 0.05 s with retpolines."""


def generate_sites(n_sites: int) -> str:
    """Return the source; it speaks the drivers' protocol.

    Each site keeps to one target, which it reads from memory each time, so that every
    site is worth promoting and none can be resolved by the compiler.
    """
    parts = [_HEAD.format(n_sites=n_sites)]
    parts += [
        f"KEPT static number target_{i}(number x) {{ return x * {2 * i + 1} + {i}; }}"
        for i in range(_N_TARGETS)
    ]
    names = ", ".join(f"target_{i}" for i in range(_N_TARGETS))
    parts.append(f"static target volatile targets[] = {{{names}}};")
    parts += [
        f"KEPT static number site_{i}(number x) "
        f"{{ return targets[{i % _N_TARGETS}](x + {i}) ^ {i + 1}; }}"
        for i in range(n_sites)
    ]
    calls = "\n".join(f"  x = site_{i}(x);" for i in range(n_sites))
    parts.append(f"KEPT static number all_sites(number x) {{\n{calls}\n  return x;\n}}")
    parts.append(_MAIN.format(n_passes=max(1, _CALLS // n_sites)))
    return "\n".join(parts)
