# SPDX-License-Identifier: Apache-2.0
"""Traces of programs, synthetic workloads, and the replay of policies against them."""
