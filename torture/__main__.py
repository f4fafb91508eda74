# SPDX-License-Identifier: Apache-2.0
"""``make torture``: run every row, print figures beside bars, write build/torture.json."""

from __future__ import annotations

import argparse
import random
import sys
import time
import traceback
from collections.abc import Sequence

from bench.options import names_of
from torture.errors import TortureError
from torture.paths import RESULTS, ROOT
from torture.results import write_outcome
from torture.row import Figure, Outcome, Row, Scale
from torture.rows import NAMES, load_row
from torture.tables import console, print_outcome, print_start, print_totals

__all__ = ["main"]

_SEEDS = 1_000_000


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the rows; returns the exit status: 1 if any of them misses a bar."""
    options = _parse(arguments)
    chosen: list[str] = options.only or list(NAMES)
    seed: int = random.randrange(_SEEDS) if options.seed is None else options.seed
    outcomes: list[Outcome] = []
    for name in chosen:
        begin_s = time.monotonic()
        try:
            row = load_row(name)
            scale = Scale(share=1.0 if options.full else row.quick_s / row.full_s, seed=seed)
            print_start(row, scale)
            outcome = run_row(row, scale)
        except TortureError as error:
            outcome = _failed(name, str(error), time.monotonic() - begin_s)
        outcomes.append(outcome)
        print_outcome(outcome)
        write_outcome(RESULTS, outcome, seed=seed, is_full=options.full)
    print_totals(outcomes)
    console.print(f"all results: {RESULTS.relative_to(ROOT)}")
    return 0 if all(outcome.is_met for outcome in outcomes) else 1


def run_row(row: Row, scale: Scale) -> Outcome:
    """Run a row; one that cannot be measured has missed its bars, and says why."""
    begin_s = time.monotonic()
    try:
        return row.run(scale)
    except TortureError as error:
        return _failed(row.name, str(error), time.monotonic() - begin_s)
    except Exception:
        # A mistake in a row, or in what it tortures, must not cost the rows after it.
        return _failed(row.name, traceback.format_exc(), time.monotonic() - begin_s)


def _failed(name: str, why: str, seconds: float) -> Outcome:
    """Return the outcome of a row that came to no figures."""
    figure = Figure(name="measured", value="no", bar="yes", is_met=False)
    return Outcome(row=name, scale="nothing", figures=(figure,), notes=(why,), seconds=seconds)


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="torture", description="Would a target notice us?")
    parser.add_argument(
        "--full", action="store_true", help="the whole, not a share of three minutes"
    )
    parser.add_argument(
        "--only",
        type=names_of(NAMES, "row"),
        metavar="ROW,...",
        help=f"only these rows, of {', '.join(NAMES)}",
    )
    parser.add_argument(
        "--seed", type=int, metavar="N", help="of all random numbers (default: a new one, printed)"
    )
    return parser.parse_args(arguments)


if __name__ == "__main__":
    sys.exit(main())
