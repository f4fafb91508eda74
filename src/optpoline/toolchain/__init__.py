# SPDX-License-Identifier: Apache-2.0
"""Compilers: what they are, our plugin for one of them, the flags that make sites for us."""
