# SPDX-License-Identifier: Apache-2.0
"""Row ``transactions``: 50 static keys and 50 static calls, all changed at once, over and over.

Four threads of the program check both promises without knowing what we do: once any thread
has executed a new site no thread executes an old one, and between ``optpoline_read_begin``
and ``_end`` all sites are of one transaction. At the end every byte is as it was.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import optpoline
from torture.build import build_target
from torture.errors import TortureError
from torture.footprint import Footprint, list_changes
from torture.paths import ROOT
from torture.program import NICE, Program
from torture.row import Figure, Outcome, Scale

__all__ = ["ROW"]

_TRANSACTIONS = 100_000
_NUMBERS = range(10, 60)
_GENERATIONS = 8
_BITS = 3
"""As in transactions.c: what the calls return, and which bit of a number a key shows."""

_TIMEOUT_S = 30.0
"""On busy CPUs threads may be put off their CPU between the two for a while."""

_POLL_S = 0.0002
_COUNT_SIZE = 8
_INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"


@dataclass(slots=True, kw_only=True)
class _Tally:
    """What the transactions came to."""

    done: int = 0
    stores: int = 0
    timeouts: int = 0
    took_s: float = 0.0
    longest_s: float = 0.0


class _Newest:
    """The newest transaction that a thread of the program has seen, read from its memory."""

    def __init__(self, target: Program) -> None:
        """Ask where it is."""
        self._path = Path(f"/proc/{target.pid}/mem")
        self._addr = target.ask_numbers("")["at"]

    def wait_for(self, generation: int) -> None:
        """Wait until a transaction was seen.

        Raises:
            TortureError: if none of its threads sees it.
        """
        deadline = time.monotonic() + _TIMEOUT_S
        with self._path.open("rb", buffering=0) as memory:
            while time.monotonic() < deadline:
                memory.seek(self._addr)
                if int.from_bytes(memory.read(_COUNT_SIZE), "little") >= generation:
                    return
                time.sleep(_POLL_S)
        raise TortureError(f"no thread has seen transaction {generation}")


@dataclass(frozen=True, slots=True, kw_only=True)
class TransactionsRow:
    """The row ``transactions``."""

    name: str = "transactions"
    about: str = "transactions over 100 static keys and calls under 4 threads that check"
    quick_s: float = 60.0
    full_s: float = 600.0

    def run(self, scale: Scale) -> Outcome:
        """Change everything at once, many times."""
        begin_s = time.monotonic()
        n_transactions = scale.of(_TRANSACTIONS)
        with Program([str(build_target("transactions", f"-I{_INCLUDE}"))], nice=NICE) as target:
            before = Footprint.of(target.pid)
            tally = _Tally()
            with optpoline.declared(target.pid) as program:
                newest = _Newest(target)
                for generation in range(1, n_transactions + 1):
                    _change_all(program, generation, tally)
                    newest.wait_for(generation)
                numbers = target.ask_numbers("")
                program.reset(timeout_s=_TIMEOUT_S)
            changes = list_changes(before, Footprint.of(target.pid))
        return Outcome(
            row=self.name,
            scale=f"{n_transactions:,} of {_TRANSACTIONS:,} transactions",
            figures=(*_figures(tally, numbers), _text_figure(changes)),
            notes=(_tell(tally, numbers), *changes),
            seconds=time.monotonic() - begin_s,
        )


def _change_all(program: optpoline.DeclaredProgram, generation: int, tally: _Tally) -> None:
    """Make one transaction."""
    transaction = program.transaction(timeout_s=_TIMEOUT_S)
    for number in _NUMBERS:
        call = transaction.static_call(f"call{number}")
        call.update(f"generation{generation % _GENERATIONS}")
        key = transaction.key(f"key{number}")
        if generation >> number % _BITS & 1:
            key.enable()
        else:
            key.disable()
    begin_s = time.monotonic()
    try:
        tally.stores += transaction.commit()
        tally.done += 1
    except optpoline.TransactionTimeout:
        tally.timeouts += 1
    took_s = time.monotonic() - begin_s
    tally.took_s += took_s
    tally.longest_s = max(tally.longest_s, took_s)


def _figures(tally: _Tally, numbers: dict[str, int]) -> tuple[Figure, ...]:
    """Return what was done, and what the threads saw."""
    is_seen = numbers["newest"] == tally.done and numbers["least"] > 0
    return (
        Figure(
            name="old sites executed after new ones",
            value=f"{numbers['order']:,}",
            bar="0",
            is_met=numbers["order"] == 0,
        ),
        Figure(
            name="mixed views between begin and end",
            value=f"{numbers['view']:,}",
            bar="0",
            is_met=numbers["view"] == 0,
        ),
        Figure(
            name="transactions that timed out",
            value=f"{tally.timeouts:,}",
            bar="0",
            is_met=tally.timeouts == 0,
        ),
        Figure(
            name="rounds of the thread that checked least",
            value=f"{numbers['least']:,}",
            bar="≥ 1",
            is_met=is_seen,
        ),
        Figure(
            name="mean transaction",
            value=f"{1e3 * tally.took_s / max(1, tally.done):.1f} ms",
            bar="",
            is_met=None,
        ),
    )


def _text_figure(changes: list[str]) -> Figure:
    """Return whether every byte is as it was."""
    return Figure(
        name="changes left in the program",
        value=f"{len(changes):,}",
        bar="0",
        is_met=not changes,
    )


def _tell(tally: _Tally, numbers: dict[str, int]) -> str:
    """Say what was done, so that nobody takes nothing for a success."""
    return (
        f"{tally.done:,} transactions of {tally.stores // max(1, tally.done)} stores each, the "
        f"longest {1e3 * tally.longest_s:.0f} ms; {numbers['rounds']:,} rounds of checks; "
        f"{numbers['not_told']:,} times a thread was kept from running for too long to tell"
    )


ROW = TransactionsRow()
