# SPDX-License-Identifier: Apache-2.0
"""The rules that were proposed for indirect branch promotion, side by side."""

from optpoline.promote.policies.registry import (
    DEFAULT_POLICY,
    POLICY_NAMES,
    SettingInfo,
    policy_named,
    settings_of,
)

__all__ = ["DEFAULT_POLICY", "POLICY_NAMES", "SettingInfo", "policy_named", "settings_of"]
