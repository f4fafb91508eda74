# SPDX-License-Identifier: Apache-2.0
"""Processes as the kernel shows them: /proc, ptrace, memory, ELF mappings; knows no site."""
