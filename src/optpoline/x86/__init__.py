# SPDX-License-Identifier: Apache-2.0
"""All that knows x86-64: bytes in, bytes out."""
