# SPDX-License-Identifier: Apache-2.0
"""C programs with as many retpoline sites as asked for: all of them in use, a part, or few."""

from __future__ import annotations

from random import Random

__all__ = [
    "busy_functions",
    "generate_busy_sites",
    "generate_hot_sites",
    "generate_sites",
    "hot_functions",
]

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
    parts += _target_functions()
    parts += [
        f"KEPT static number site_{i}(number x) "
        f"{{ return targets[{i % _N_TARGETS}](x + {i}) ^ {i + 1}; }}"
        for i in range(n_sites)
    ]
    calls = "\n".join(f"  x = site_{i}(x);" for i in range(n_sites))
    parts.append(f"KEPT static number all_sites(number x) {{\n{calls}\n  return x;\n}}")
    parts.append(_MAIN.format(n_passes=max(1, _CALLS // n_sites)))
    return "\n".join(parts)


_HOT_WORKER = """
static volatile int stopping, phase;
static volatile unsigned long rounds;

static void *work(void *unused) {{
  number x = 1;
  while (!stopping) {{
    switch (phase) {{
{cases}
    }}
    rounds++;
  }}
  printf("result %lu\\n", x);
  return unused;
}}

int main(void) {{
  pthread_t thread;
  char line[64];
  pthread_create(&thread, NULL, work, NULL);
  setvbuf(stdout, NULL, _IOLBF, 0);
  puts("ready");
  while (fgets(line, sizeof line, stdin)) {{
    phase = atoi(line);
    printf("ok %lu\\n", rounds);
  }}
  stopping = 1;
  pthread_join(thread, NULL);
  printf("rounds %lu\\n", rounds);
  return 0;
}}
"""

_HOT_HEAD = """\
/* Generated: {n_sites} indirect branches in {n_functions} functions, few of them hot. */
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>

typedef unsigned long number;
typedef number (*target)(number);
#define KEPT __attribute__((noipa, used))
static volatile number never;
"""

_TAIL_EVERY = 7
"""Of so many functions one ends in a jump instead of a call."""

_CALLS_A_ROUND = 4096
"""Calls in a round of a phase, so that the rarest of a few hundred functions is in it too."""


def generate_hot_sites(n_sites: int, *, n_hot: int, n_phases: int = 2, seed: int = 1) -> str:
    """Return the source of a program of which a small part runs, another one in each phase.

    Each function has two sites (a compiler may make three of them), of which the first never
    runs. In a phase ``hot_functions`` run, how often by Zipf's law; they lie all over the
    text. A line on standard input sets the phase, and is answered with "ok ROUNDS"; at its
    end the program prints "rounds N". All work is done by one thread.

    Args:
        n_sites: Indirect branches, an even number.
        n_hot: Functions that run in each phase; the phases have none in common.
        n_phases: Phases.
        seed: Of the order in which they are called.
    """
    n_functions = n_sites // 2
    if n_phases * n_hot > n_functions:
        raise ValueError(f"{n_functions} functions are too few for {n_phases} times {n_hot}")
    parts = [_HOT_HEAD.format(n_sites=n_sites, n_functions=n_functions), *_target_functions()]
    parts += [_two_sites(number) for number in range(n_functions)]
    random = Random(seed)
    for phase in range(n_phases):
        order = _zipf_order(hot_functions(n_sites, n_hot, n_phases, phase), random)
        parts.append(_calling(f"phase_{phase}", order))
    cases = "\n".join(f"    case {n}: x = phase_{n}(x); break;" for n in range(n_phases))
    parts.append(_HOT_WORKER.format(cases=cases))
    return "\n".join(parts)


_CALLS_A_HOT_FUNCTION = 10
"""In a round, in which each other function is called once."""

_CALLS_A_FUNCTION = 250
"""Of the functions that make the calls: compilers take long over thousands in one."""

_MORE_TARGETS = (0, 0, 0, 1, 0, 0, 0, 3)
"""How many targets a site has beside its first, from site to site."""


def generate_busy_sites(n_sites: int, *, n_hot: int, seed: int = 1) -> str:
    """Return the source of a program all of whose sites run, some of them often.

    Each function has one site, a call. Most have one target, one in eight has two, one
    four. In a round each function is called once, ``busy_functions`` ten times, in an order
    in which neighbours lie far apart. It speaks the protocol of ``generate_hot_sites`` and
    has one phase.

    Args:
        n_sites: Indirect calls.
        n_hot: Functions that run often.
        seed: Of the order in which they are called.
    """
    parts = [_HOT_HEAD.format(n_sites=n_sites, n_functions=n_sites), *_target_functions()]
    for number in range(n_sites):
        more = _MORE_TARGETS[number // _N_TARGETS % len(_MORE_TARGETS)]
        which = f"({number % _N_TARGETS} + (x >> 20 & {more})) % {_N_TARGETS}"
        parts.append(
            f"KEPT static number function_{number}(number x) "
            f"{{ return targets[{which}](x + {number}) ^ {number + 1}; }}"
        )
    calls = [*range(n_sites), *busy_functions(n_sites, n_hot) * (_CALLS_A_HOT_FUNCTION - 1)]
    Random(seed).shuffle(calls)
    groups = [calls[i : i + _CALLS_A_FUNCTION] for i in range(0, len(calls), _CALLS_A_FUNCTION)]
    parts += [_calling(f"group_{i}", group) for i, group in enumerate(groups)]
    steps = "\n".join(f"  x = group_{i}(x);" for i in range(len(groups)))
    parts.append(f"KEPT static number phase_0(number x) {{\n{steps}\n  return x;\n}}")
    parts.append(_HOT_WORKER.format(cases="    case 0: x = phase_0(x); break;"))
    return "\n".join(parts)


def busy_functions(n_sites: int, n_hot: int) -> list[int]:
    """Return the numbers of the functions that run often, spread over the text."""
    return [rank * n_sites // n_hot for rank in range(n_hot)]


def _calling(name: str, numbers: list[int]) -> str:
    """Return a function that calls others in turn."""
    calls = "\n".join(f"  x = function_{number}(x);" for number in numbers)
    return f"KEPT static number {name}(number x) {{\n{calls}\n  return x;\n}}"


def hot_functions(n_sites: int, n_hot: int, n_phases: int, phase: int) -> list[int]:
    """Return the numbers of the functions that run in a phase, hottest first."""
    stride = n_sites // 2 // (n_hot * n_phases)
    return [(rank * n_phases + phase) * stride for rank in range(n_hot)]


def _target_functions() -> list[str]:
    """Return the functions that all sites lead to, and the table that names them."""
    functions = [
        f"KEPT static number target_{i}(number x) {{ return x * {2 * i + 1} + {i}; }}"
        for i in range(_N_TARGETS)
    ]
    names = ", ".join(f"target_{i}" for i in range(_N_TARGETS))
    return [*functions, f"static target volatile targets[] = {{{names}}};"]


def _two_sites(number: int) -> str:
    """Return one function of a site that never runs and one that does."""
    cold = f"if (never) x = targets[{(number + 1) % _N_TARGETS}](x) + 1;"
    call = f"targets[{number % _N_TARGETS}](x + {number})"
    last = call if number % _TAIL_EVERY == 0 else f"{call} ^ {number + 1}"
    return f"KEPT static number function_{number}(number x) {{ {cold} return {last}; }}"


def _zipf_order(functions: list[int], random: Random) -> list[int]:
    """Return the calls of a round: each function at least once, the n-th ~ 1/n as often."""
    total = sum(1 / rank for rank in range(1, len(functions) + 1))
    calls = [
        number
        for rank, number in enumerate(functions, 1)
        for _ in range(max(1, round(_CALLS_A_ROUND / (rank * total))))
    ]
    random.shuffle(calls)
    return calls
