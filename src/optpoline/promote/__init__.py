# SPDX-License-Identifier: Apache-2.0
"""From counts to branch trees: the cost model, optimal trees, policies."""
