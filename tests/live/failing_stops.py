# SPDX-License-Identifier: Apache-2.0
"""Changes of text that fail half-way."""

from __future__ import annotations

from collections.abc import Sequence

import pytest

from optpoline.controller import linker
from optpoline.controller.poking import Poked, poke_in_stops
from optpoline.controller.target import Target
from optpoline.errors import StopTimeout
from optpoline.patch.text import Poke

__all__ = ["fail_at"]


def fail_at(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """Let a change of text fail after its first store, as if threads did not stop then."""
    n_calls = 0

    def failing(target: Target, pokes: Sequence[Poke], *, may_delay: bool = False) -> Poked:
        nonlocal n_calls
        n_calls += 1
        if n_calls != number:
            return poke_in_stops(target, pokes, may_delay=may_delay)
        poke_in_stops(target, pokes[:1])
        raise StopTimeout(0, (target.pid,))

    monkeypatch.setattr(linker, "poke_in_stops", failing)
