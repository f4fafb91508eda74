# SPDX-License-Identifier: Apache-2.0
"""``optpoline doctor [PID]``: what this machine and that target allow."""

from __future__ import annotations

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.machine import check_machine
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.errors import UnsupportedTarget
from optpoline.process.checks import Check, CheckStatus
from optpoline.process.permissions import diagnose
from optpoline.report.check_text import format_checks
from optpoline.report.json_document import checks_document

__all__ = ["doctor_command"]


@click.command("doctor")
@click.argument("pid", type=PID, required=False)
@shared_options
@pass_invocation
def doctor_command(invocation: Invocation, pid: int | None) -> None:
    """Say what this machine and a process allow, and how to help it.

    Exits with 0 if an attach would work, else with what the attach would exit
    with. Nothing is touched.
    """
    invocation.sink.validate_writable()
    machine = check_machine()
    exit_code = 0
    if any(check.status is CheckStatus.FAIL for check in machine):
        exit_code = UnsupportedTarget.exit_code
    target: tuple[Check, ...] = ()
    if pid is not None:
        diagnosis = diagnose(pid)
        target = diagnosis.checks
        error = diagnosis.error()
        exit_code = exit_code if error is None else error.exit_code
    invocation.exit_code = exit_code
    invocation.sink.write(checks_document(pid, machine, target, exit_code))
    if invocation.sink.takes_stdout:
        return
    style = invocation.stdout_style()
    lines = format_checks("this machine", machine, style)
    if pid is not None:
        verdict = "can be attached to" if exit_code == 0 else "cannot be attached to"
        lines += ["", *format_checks(f"process {pid} {verdict}", target, style)]
    invocation.print_data(lines)
