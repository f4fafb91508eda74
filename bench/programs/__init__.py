# SPDX-License-Identifier: Apache-2.0
"""The programs that are measured: one module each, which builds it and names its work."""
