# SPDX-License-Identifier: Apache-2.0
"""Torture: runs that would show if a target noticed us, each with figures beside their bars.

Nothing here is part of the installed package. What it builds and writes is below ``build/``.
Each row is one invariant under load (``torture/rows``); the programs that rows attach to are
in ``torture/targets``. A row's short run does a share of the full run and prints which.
"""
