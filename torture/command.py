# SPDX-License-Identifier: Apache-2.0
"""The command line of optpoline, run as a user would."""

from __future__ import annotations

import json
import signal
import subprocess

from torture.errors import TortureError
from torture.paths import OPTPOLINE

__all__ = ["CommandFailed", "JsonObject", "run_json", "start_attach"]

JsonObject = dict[str, object]

_TIMEOUT_S = 60.0


class CommandFailed(TortureError):
    """The command ended with an error."""


def run_json(*arguments: str) -> JsonObject:
    """Run a command with ``--json -``; return its document.

    Raises:
        CommandFailed: if it does not end with status 0 and a document.
    """
    command = [str(OPTPOLINE), *arguments, "--json", "-"]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT_S, check=False
        )
    except subprocess.TimeoutExpired as error:
        raise CommandFailed(f"{' '.join(arguments)} did not end in {_TIMEOUT_S:.0f} s") from error
    words = f"{' '.join(arguments)} ended with status {done.returncode}: {done.stderr.strip()}"
    if done.returncode:
        raise CommandFailed(f"{words} {done.stdout.strip()[-500:]}")
    try:
        document = json.loads(done.stdout)
    except ValueError as error:
        raise CommandFailed(f"{words}; no document") from error
    if not isinstance(document, dict):
        raise CommandFailed(f"{words}; its document is no object")
    return document


def start_attach(pid: int, *options: str) -> subprocess.Popen[bytes]:
    """Start ``optpoline attach``, silent; the caller ends it."""
    return subprocess.Popen(
        [str(OPTPOLINE), "attach", "--quiet", *options, str(pid)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        # A shell that runs us in the background has it ignored.
        preexec_fn=_heed_interrupts,
    )


def _heed_interrupts() -> None:
    """Let SIGINT end the command, as Ctrl-C does."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)
