# SPDX-License-Identifier: Apache-2.0
"""``optpoline doctor [PID]``: what this machine and that target allow."""

from __future__ import annotations

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.machine import check_machine
from optpoline.cli.options import PID, pass_invocation, shared_options
from optpoline.controller.lock import find_controller
from optpoline.controller.summary import LeftBehind
from optpoline.errors import ControllerActive, OptpolineError, UnsupportedTarget
from optpoline.process.checks import Check, CheckStatus, Failure, failed, passed, warned
from optpoline.process.permissions import diagnose
from optpoline.report.check_text import format_checks
from optpoline.report.json_document import checks_document
from optpoline.report.session_text import count_of

__all__ = ["doctor_command"]


@click.command("doctor")
@click.argument("pid", type=PID, required=False)
@shared_options
@pass_invocation
def doctor_command(invocation: Invocation, pid: int | None) -> None:
    """Say what this machine and a process allow, and what helps.

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
        traces = _check_traces(invocation, pid) if error is None else None
        if traces is not None:
            target += (traces,)
            if traces.status is CheckStatus.FAIL:
                exit_code = exit_code or ControllerActive.exit_code
    invocation.exit_code = exit_code
    invocation.sink.write(checks_document(pid, machine, target, exit_code))
    if invocation.sink.takes_stdout:
        return
    style = invocation.stdout_style()
    lines = format_checks("this machine", machine, style)
    if pid is not None:
        verdict = "can be attached to" if exit_code == 0 else "cannot be attached to"
        if exit_code == 0 and any(check.status is CheckStatus.WARN for check in target):
            verdict += "; mind the warnings"
        lines += ["", *format_checks(f"process {pid} {verdict}", target, style)]
    invocation.print_data(lines)


def _check_traces(invocation: Invocation, pid: int) -> Check | None:
    """Say what of optpoline is in a process; None if that is not to be seen."""
    try:
        left = invocation.api.read_status(pid)
    except OptpolineError:
        return None
    name = "optpoline"
    if left is None:
        return passed(name, "nothing of optpoline is in it")
    if left.is_only_set:
        return passed(name, f"static keys and calls are set: {', '.join(left.settings)}")
    controller_pid = find_controller(pid) if left.controller_alive else None
    if controller_pid is not None:
        sentence = f"controller {controller_pid} works on it now ({_describe(left)})"
        advice = f"end that one first: kill {controller_pid}"
        return failed(name, sentence, advice, Failure.REFUSED)
    if left.controller_alive:
        sentence = f"it has {_describe(left)} from the process that it was forked from"
    else:
        sentence = f"an earlier controller left {_describe(left)} in it"
    return warned(name, sentence, f"an attach undoes that first, as does: optpoline detach {pid}")


def _describe(left: LeftBehind) -> str:
    """Name what there is."""
    return f"{count_of(left.sites, 'promoted site')}, {count_of(left.arenas, 'arena')}"
