# SPDX-License-Identifier: Apache-2.0
"""libxml2 parsing and searching: the program that nothing was tuned for."""

from __future__ import annotations

import os
from pathlib import Path

from bench.build import Variant, build_once, compile_program, variant_flags
from bench.commands import run_command
from bench.driver import Driver
from bench.paths import BENCH
from bench.sources import LIBXML2, fetch_source
from bench.workload import Workload

__all__ = ["WORKLOADS", "build_libxml2"]

_DRIVER = BENCH / "libxml2" / "driver.c"
_OPTIONS = (
    "--disable-shared",
    "--disable-dependency-tracking",
    "--without-python",
    "--without-lzma",
    "--without-zlib",
    "--without-iconv",
    "--without-threads",
    "--without-http",
    "--without-ftp",
)


def _workload(kind: str) -> Workload:
    """Return the workload of one argument of the driver."""

    def start(executable: Path, name: str) -> Driver:
        return Driver(name, [str(executable), kind])

    return Workload(group="other", name=f"libxml2 {kind}", start=start)


WORKLOADS = (_workload("sax"), _workload("xpath"))


def build_libxml2(variant: Variant) -> Path:
    """Build the library and our driver, linked statically; returns the driver."""
    root = fetch_source(LIBXML2)
    flags = variant_flags(variant)

    def build(directory: Path) -> Path:
        environment = {**os.environ, "CFLAGS": " ".join((*flags, "-w"))}
        run_command([str(root / "configure"), *_OPTIONS], cwd=directory, env=environment)
        run_command(["make", "-j2", "libxml2.la"], cwd=directory, env=environment)
        return compile_program(
            [_DRIVER],
            output=directory / "xml-driver",
            flags=(*flags, f"-I{root / 'include'}", f"-I{directory / 'include'}"),
            libraries=(str(directory / ".libs" / "libxml2.a"), "-lm"),
        )

    return build_once("libxml2", variant, [_DRIVER, *flags, *_OPTIONS], build)
