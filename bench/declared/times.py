# SPDX-License-Identifier: Apache-2.0
"""How long each form takes: as built and changed, side by side, in every layout.

Of each layout three processes run at the same time: one that nothing has changed, one whose
calls are promoted and set and whose key is on, and one like that which is not
position-independent, where a guard compares with an immediate. In each round each loop of each
of them has its turn. What the empty loop of the same process takes is taken away.

In each layout the fastest turn counts: interference only ever adds time, and a neighbour on the
other thread of the core makes each of these differences twice as large. So all is
told for the median turn as well, neighbours and all.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence

from bench import statistics
from bench.declared.program import FORMS, LAYOUTS, Calls, Layout, build_calls, changed
from bench.figures import Figure
from bench.rounds import take_turns

__all__ = ["measure_declared_times"]

_N_ROUNDS = 1_000_000
"""Rounds of a loop at a time: 0.3 to 12 ms."""

_PROMOTED_BAR_NS = 0.5
_BUILT = "as built"
_CHANGED = "changed"
_FIXED = "changed, not position-independent"
_STATES = (_BUILT, _CHANGED, _FIXED)
_REPORTED: tuple[tuple[str, str, str], ...] = (
    ("direct call", _CHANGED, "direct"),
    ("call through a pointer", _CHANGED, "pointer"),
    ("retpoline", _CHANGED, "retpoline"),
    ("dynamic_call, retpolines, not promoted", _BUILT, "dynamic"),
    ("dynamic_call, retpolines, promoted", _CHANGED, "dynamic"),
    ("dynamic_call, plugin, not promoted", _BUILT, "dynamic_plain"),
    ("dynamic_call, plugin, promoted", _CHANGED, "dynamic_plain"),
    ("dynamic_call, retpolines, not PIE, promoted", _FIXED, "dynamic"),
    ("static call, inline, never set", _BUILT, "static_inline"),
    ("static call, inline, set", _CHANGED, "static_inline"),
    ("static call, out-of-line, set", _CHANGED, "static_out_of_line"),
    ("static key, off", _BUILT, "key"),
    ("static key, on, with the add that it switches", _CHANGED, "key"),
    ("variable tested, off", _BUILT, "variable_off"),
    ("variable tested, on, with the add that it switches", _BUILT, "variable_on"),
)
_BARS = (
    ("dynamic_call, retpolines, promoted", _CHANGED, "dynamic"),
    ("dynamic_call, plugin, promoted", _CHANGED, "dynamic_plain"),
    ("dynamic_call, retpolines, not PIE, promoted", _FIXED, "dynamic"),
    ("dynamic_call, plugin, not PIE, promoted", _FIXED, "dynamic_plain"),
)

Samples = Mapping[str, Sequence[int]]
PerLayout = Mapping[tuple[str, str], Sequence[float]]
"""State and form to nanoseconds a round in each layout."""


def measure_declared_times(*, rounds: int) -> Iterator[Figure]:
    """Measure all forms in all layouts.

    Args:
        rounds: Turns of each loop in each layout.
    """
    samples = _measure(rounds)
    yield from _tell("a round", _reduce(samples, min), bar=_PROMOTED_BAR_NS)
    median = _reduce(samples, lambda turns: statistics.median(turns).value)
    yield from _tell("a round, median turn", median, bar=None)


def _tell(what: str, times: PerLayout, *, bar: float | None) -> Iterator[Figure]:
    """Tell what forms take, and promoted ones more than a direct call of the same process."""
    yield _figure("empty loop, nothing taken away: " + what, times[_CHANGED, "empty"], bar=None)
    for name, state, form in _REPORTED:
        yield _figure(f"{name}: {what}", _difference(times, state, form, "empty"), bar=None)
    for name, state, form in _BARS:
        more = _difference(times, state, form, "direct")
        yield _figure(f"{name}, more than a direct call: {what}", more, bar=bar)


def _measure(rounds: int) -> Samples:
    """Have all processes take turns; return the times of each turn by name."""
    turns: dict[str, Callable[[], int]] = {}
    with contextlib.ExitStack() as stack:
        for layout in LAYOUTS:
            for state in _STATES:
                executable = build_calls(layout, is_pie=state != _FIXED)
                calls = stack.enter_context(Calls(executable))
                if state != _BUILT:
                    stack.enter_context(changed(calls))
                for form in FORMS:
                    name = _name_turn(layout, state, form)
                    turns[name] = functools.partial(calls.run, form, _N_ROUNDS)
        return take_turns(turns, rounds=rounds)


def _reduce(samples: Samples, reduce: Callable[[Sequence[int]], float]) -> PerLayout:
    """Make one number of each loop's turns."""
    return {
        (state, form): [
            reduce(samples[_name_turn(layout, state, form)]) / _N_ROUNDS for layout in LAYOUTS
        ]
        for state in _STATES
        for form in FORMS
    }


def _difference(times: PerLayout, state: str, form: str, without: str) -> list[float]:
    """Return what a form takes more than another in the same process."""
    return [a - b for a, b in zip(times[state, form], times[state, without], strict=True)]


def _figure(name: str, values: Sequence[float], *, bar: float | None) -> Figure:
    """Say the median over the layouts, and how far they are apart."""
    spread = f"({min(values):.2f} to {max(values):.2f} in {len(values)} layouts)"
    value = statistics.median(values).value
    return Figure(name=f"{name} {spread}", value=value, unit="ns", bar=bar)


def _name_turn(layout: Layout, state: str, form: str) -> str:
    """Name the turns of a form in a process."""
    return f"{layout.loop_off} {state} {form}"
