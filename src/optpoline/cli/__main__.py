# SPDX-License-Identifier: Apache-2.0
"""Where the command begins: ``optpoline``, and ``python -m optpoline.cli``.

Imports take some tenths of a second, and Ctrl-C in them would show a traceback. So this
module imports only what the interpreter has by now, and the rest where that is caught.
"""

from __future__ import annotations

import os
import sys

__all__ = ["main"]

EXIT_INTERRUPTED = 130


def main() -> int:
    """Run the command that the process was started with; return its exit status."""
    try:
        return _run()
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def _run() -> int:
    """Import the command and run it."""
    import signal

    before = signal.getsignal(signal.SIGINT)
    # Where it is ignored (a background job of a script) it stays so.
    if before is signal.default_int_handler:
        # An exception in the middle of an import may come out of it as another one.
        signal.signal(signal.SIGINT, _leave)
    from optpoline.cli.main import main as run_command

    signal.signal(signal.SIGINT, before)
    return run_command()


def _leave(_number: int, _frame: object) -> None:
    """End at once: nothing is done yet, and nothing is open."""
    os._exit(EXIT_INTERRUPTED)


if __name__ == "__main__":
    sys.exit(main())
