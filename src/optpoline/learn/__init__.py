# SPDX-License-Identifier: Apache-2.0
"""Which cells a counting block counts in, and what the counts say."""
