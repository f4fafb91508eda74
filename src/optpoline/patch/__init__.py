# SPDX-License-Identifier: Apache-2.0
"""Arenas, blocks in them, the poke protocol, and who may still be inside."""
