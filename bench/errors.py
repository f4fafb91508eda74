# SPDX-License-Identifier: Apache-2.0
"""The one exception of the benchmarks: something they need is not there or went wrong."""

from __future__ import annotations

__all__ = ["BenchError"]


class BenchError(Exception):
    """A sentence for the user: what could not be fetched, built or measured, and why."""
