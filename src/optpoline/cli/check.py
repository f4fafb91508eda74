# SPDX-License-Identifier: Apache-2.0
"""``optpoline check PID``: verify from outside what was done to a process."""

from __future__ import annotations

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.report.audit_text import format_audit
from optpoline.report.json_document import audit_document

__all__ = ["check_command"]

EXIT_FAULTS = 7


@click.command("check")
@click.argument("pid", type=PID)
@shared_options
@pass_invocation
def check_command(invocation: Invocation, pid: int) -> None:
    """Verify what optpoline did to a process.

    Looks at every site, block and byte of text from outside, while the program
    and perhaps a controller run on. Nothing is stopped or written. Exits with 7
    if anything of optpoline's is not as it must be.
    """
    invocation.sink.validate_writable()
    report = invocation.api.audit(pid)
    invocation.exit_code = 0 if report.is_sound else EXIT_FAULTS
    invocation.sink.write(audit_document(report))
    if not invocation.sink.takes_stdout:
        style = invocation.stdout_style()
        invocation.print_data(format_audit(report, style, with_all=invocation.verbose))
