# SPDX-License-Identifier: Apache-2.0
"""What holds for all tests."""

from __future__ import annotations

from hypothesis import settings

# How long an example takes is the machine's affair: nothing here depends on that.
settings.register_profile("optpoline", deadline=None)
settings.load_profile("optpoline")
