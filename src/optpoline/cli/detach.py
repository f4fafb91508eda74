# SPDX-License-Identifier: Apache-2.0
"""``optpoline detach PID``: undo what an earlier run left in a process."""

from __future__ import annotations

import click

from optpoline.cli.api import Api
from optpoline.cli.drive import EXIT_NOT_UNDONE, NOT_UNDONE
from optpoline.cli.invocation import Invocation
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.errors import OptpolineError
from optpoline.report.json_document import detach_document
from optpoline.report.session_text import format_detach

__all__ = ["detach_command"]


@click.command("detach")
@click.argument("pid", type=PID)
@click.option(
    "--settings", is_flag=True, help="Put static keys and calls back to what they begin as, too."
)
@shared_options
@pass_invocation
def detach_command(invocation: Invocation, pid: int, settings: bool) -> None:
    """Put back all bytes an earlier optpoline changed.

    Static keys and calls stay as they were set, unless --settings is given.
    """
    invocation.sink.validate_writable()
    console = invocation.console()
    if _is_untouched(invocation.api, pid):
        if settings:
            # What notes that cannot be read declare may be set all the same: then it says so.
            invocation.api.declared(pid).close()
        console.say(f"process {pid}: nothing of optpoline is in it, nothing to undo")
        invocation.sink.write(detach_document(pid, None))
        return
    try:
        result = invocation.api.restore(pid, settings=settings)
    except OptpolineError:
        console.say_more(f"process {pid}: nothing more was changed")
        raise
    console.say_all(format_detach(result))
    invocation.sink.write(detach_document(pid, result))
    if result.outcome in NOT_UNDONE:
        invocation.exit_code = EXIT_NOT_UNDONE


def _is_untouched(api: Api, pid: int) -> bool:
    """Tell whether nothing of ours is in a process, nor about to come to be there."""
    if api.read_status(pid) is not None:
        return False
    # A thread that was put on a call by a controller that was killed may still have to make it.
    api.wait_for_late_calls(pid)
    return api.read_status(pid) is None
