# SPDX-License-Identifier: Apache-2.0
"""The rows of the torture table, by name; a row's module is imported when the row is run."""

from __future__ import annotations

import importlib

from torture.errors import TortureError
from torture.row import Row

__all__ = ["NAMES", "load_row"]

_MODULES = {
    "calls": "torture.rows.calls",
    "kills": "torture.rows.kills",
    "cycles": "torture.rows.cycles",
    "syscalls": "torture.rows.syscalls",
    "threads": "torture.rows.threads",
    "emulation": "torture.rows.emulation",
    "servers": "torture.rows.servers",
    "transactions": "torture.rows.transactions",
}

NAMES = tuple(_MODULES)


def load_row(name: str) -> Row:
    """Import a row.

    Args:
        name: One of ``NAMES``.

    Raises:
        TortureError: if its module cannot be imported or has no ``ROW``.
    """
    try:
        module = importlib.import_module(_MODULES[name])
        row: Row = module.ROW
    except (ImportError, AttributeError) as error:
        raise TortureError(f"row {name} cannot be loaded: {error}") from error
    return row
