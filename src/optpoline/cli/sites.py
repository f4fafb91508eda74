# SPDX-License-Identifier: Apache-2.0
"""``optpoline sites PID|FILE``: list retpoline and declared sites, touching nothing."""

from __future__ import annotations

from collections.abc import Sequence

import click

from optpoline.cli.invocation import Invocation
from optpoline.cli.options import PID_MAX, parse_pid, pass_invocation, shared_options
from optpoline.controller.summary import ModuleSummary, SiteState
from optpoline.errors import NoSites, UsageError
from optpoline.report.declared_text import format_declared
from optpoline.report.json_document import sites_document
from optpoline.report.session_text import count_of
from optpoline.report.sites_text import format_no_sites, format_sites

__all__ = ["sites_command"]


@click.command("sites")
@click.argument("target", metavar="PID|FILE")
@shared_options
@pass_invocation
def sites_command(invocation: Invocation, target: str) -> None:
    """List the retpoline sites of a process or of an ELF file.

    A number is a process id; write ./4711 for a file of that name.
    """
    invocation.sink.validate_writable()
    pid = parse_pid(target)
    if pid is not None and not 0 < pid <= PID_MAX:
        what = "not a process id" if pid <= 0 else f"above the largest process id, {PID_MAX}"
        raise UsageError(f"{target} is {what}", hint=f"for a file write ./{target}")
    listing = invocation.api.find_sites(target if pid is None else pid)
    if not listing.sites and not listing.declared:
        name = target if pid is None else f"process {pid}"
        invocation.console().say_all(f"note: {note}" for note in listing.notes)
        raise _no_sites(name, listing.modules, is_file=pid is None)
    modules, sites, declared = listing.modules, listing.sites, listing.declared
    invocation.sink.write(sites_document(target, modules, sites, listing.notes, declared))
    if not invocation.sink.takes_stdout:
        style = invocation.stdout_style()
        lines = format_sites(modules, sites, style)
        also = format_declared(declared, style)
        invocation.print_data([*lines, *([""] if lines and also else []), *also])
    console = invocation.console()
    n_modules = len({site.module for site in sites})
    n_promoted = sum(site.state is SiteState.PROMOTED for site in sites)
    counts = f"{count_of(len(sites), 'site')} in {count_of(n_modules, 'module')}"
    if n_promoted:
        counts += f", {n_promoted} promoted"
    if declared:
        counts += f"; {count_of(len(declared), 'declaration')}"
    console.say(counts)
    console.say_all(f"note: {note}" for note in listing.notes)


def _no_sites(name: str, modules: Sequence[ModuleSummary], *, is_file: bool) -> NoSites:
    """Return the error that says what there is instead, and what that means."""
    # Not at the top: --help must not wait for numpy.
    from optpoline.controller.no_sites import no_sites_hint

    instead = format_no_sites(modules, is_file=is_file)
    hint = no_sites_hint(
        n_inline=sum(module.n_inline for module in modules),
        has_thunks=any(module.n_thunks for module in modules),
    )
    return NoSites(f"{name} has no retpoline site: {instead}", hint=hint)
