# SPDX-License-Identifier: Apache-2.0
"""Commands of the system that the benchmarks run: found, installed or named, and run."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from bench.errors import BenchError

__all__ = ["end_process", "require_command", "run_command"]

_END_S = 5.0
_SHOWN_LINES = 15
"""Lines of a failed command's output that are shown: the error is at the end."""


def require_command(name: str, *, package: str) -> str:
    """Find a command, installing its Debian package where we are root.

    Args:
        name: The command, such as ``g++``.
        package: The Debian package that has it.

    Returns:
        Its path.

    Raises:
        BenchError: if it is not there and cannot be installed; names the line to run.
    """
    found = shutil.which(name)
    if found:
        return found
    line = ["apt-get", "install", "-y", "-qq", "--no-install-recommends", package]
    if os.geteuid() != 0 or not shutil.which("apt-get"):
        raise BenchError(f"{name} is not installed; as root run: {' '.join(line)}")
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    run_command(["apt-get", "update", "-qq"], env=environment)
    run_command(line, env=environment)
    found = shutil.which(name)
    if not found:
        raise BenchError(f"package {package} was installed, but has no {name}")
    return found


def run_command(
    argv: Sequence[str],
    *,
    cwd: Path | None = None,
    env: Mapping[str, str] | None = None,
    timeout_s: float = 900,
) -> str:
    """Run a command that has to succeed, without standard input.

    Returns:
        Its standard output.

    Raises:
        BenchError: if it cannot be started, fails or takes too long; with its last lines.
    """
    try:
        done = subprocess.run(
            argv,
            cwd=cwd,
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=timeout_s,
            check=False,
        )
    except OSError as error:
        raise BenchError(f"cannot run {argv[0]}: {error.strerror}") from error
    except subprocess.TimeoutExpired as error:
        raise BenchError(f"{argv[0]} took longer than {timeout_s:.0f} s") from error
    if done.returncode != 0:
        lines = (done.stdout + done.stderr).strip().splitlines()[-_SHOWN_LINES:]
        raise BenchError(f"{' '.join(argv[:6])} failed:\n" + "\n".join(lines))
    return done.stdout


def end_process(process: subprocess.Popen[bytes]) -> None:
    """End a process of ours: by SIGTERM, or SIGKILL where that does not in a few seconds."""
    process.terminate()
    try:
        process.wait(timeout=_END_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
