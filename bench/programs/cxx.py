# SPDX-License-Identifier: Apache-2.0
"""A C++ program of our own: virtual calls over 1 to 8 classes, nothing but that."""

from __future__ import annotations

from pathlib import Path

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.commands import require_command
from bench.driver import Driver
from bench.paths import BENCH
from bench.workload import Workload

__all__ = ["CLASSES", "WORKLOADS", "build_cxx", "n_classes"]

_SOURCE = BENCH / "cxx" / "virtual.cpp"
CLASSES = (1, 2, 4, 8)
_ORDERS = ("sorted", "shuffled")
_THREADS = (1, 2)


def _workload(classes: int, order: str, threads: int) -> Workload:
    """Return the workload of one set of arguments."""

    def start(executable: Path, name: str) -> Driver:
        return Driver(name, [str(executable), str(classes), order, str(threads)])

    name = f"{classes} classes, {order}, {threads} threads"
    return Workload(group="cxx", name=name, start=start)


WORKLOADS = tuple(
    _workload(classes, order, threads)
    for classes in CLASSES
    for order in _ORDERS
    for threads in _THREADS
)


def n_classes(name: str) -> int:
    """Return the number of classes that a workload's name tells.

    >>> n_classes("4 classes, sorted, 1 threads")
    4
    """
    return int(name.split()[0])


def build_cxx(variant: Variant) -> Path:
    """Build the program; returns its executable."""
    compiler = require_command("g++", package="g++")
    flags = (*variant_flags(variant), "-std=c++17", "-pthread")

    def build(directory: Path) -> Path:
        return compile_program(
            [_SOURCE], output=directory / "virtual", flags=flags, compiler=compiler
        )

    return build_once("cxx", variant, [_SOURCE, *flags], build)
