# SPDX-License-Identifier: Apache-2.0
"""A static key and a static call, for tests of how they are shown."""

from __future__ import annotations

from optpoline.controller.summary import KeyState, KeySummary, StaticCallSummary

__all__ = ["CODEC", "TRACE"]

TRACE = KeySummary(
    name="trace",
    state=KeyState.ON,
    begins_on=False,
    count=2,
    n_branches=3,
    is_torn=False,
    modules=("/bin/server",),
    file="src/server.c",
    line=7,
)
CODEC = StaticCallSummary(
    name="codec",
    target="codec_v2",
    default="codec_v1",
    targets=("codec_v1", "codec_v2"),
    is_out_of_line=False,
    n_calls=4,
    is_set=True,
    is_torn=False,
    modules=("/bin/server",),
    file="src/server.c",
    line=9,
)
