# SPDX-License-Identifier: Apache-2.0
"""``optpoline status PID``: what an earlier run left in a process."""

from __future__ import annotations

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.report.json_document import status_document
from optpoline.report.session_text import format_left_behind

__all__ = ["status_command"]


@click.command("status")
@click.argument("pid", type=PID)
@shared_options
@pass_invocation
def status_command(invocation: Invocation, pid: int) -> None:
    """Show what an earlier optpoline left in a process."""
    invocation.sink.validate_writable()
    left = invocation.api.read_status(pid)
    invocation.sink.write(status_document(pid, left))
    if invocation.sink.takes_stdout:
        return
    if left is None:
        invocation.print_data([f"process {pid}: nothing of optpoline is in it"])
    else:
        invocation.print_data(format_left_behind(left, with_addresses=invocation.verbose))
