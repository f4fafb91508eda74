# SPDX-License-Identifier: Apache-2.0
"""What a controller that was killed leaves of plain sites, as others see it."""

from __future__ import annotations

import optpoline
from optpoline.controller.audit import audit
from optpoline.controller.summary import SiteState
from tests.live.witness import start_cli, wait_for_line

__all__ = ["check_left_by_kill"]

_LEARN_S = 0.3


def check_left_by_kill(pid: int) -> optpoline.SiteReport:
    """Promote plain sites, kill the controller, and check what is told of them then."""
    listed = optpoline.find_sites(pid)
    command = ("attach", "-v", "--promote-plain", "--learn-seconds", _LEARN_S, pid)
    with start_cli(*command) as controller:
        wait_for_line(controller, "promoted")
        controller.kill()
    assert audit(pid).is_sound
    # Whoever looks sees the program as its source has it, and where each site leads now.
    left = optpoline.find_sites(pid)
    assert SiteState.PROMOTED in {site.state for site in left.sites}
    assert left.declared == listed.declared
    assert [site.thunk for site in left.sites] == [site.thunk for site in listed.sites]
    return left
