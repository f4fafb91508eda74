# SPDX-License-Identifier: Apache-2.0
"""Demo and benchmarks: real programs, built several ways and measured in turn.

Nothing here is part of the installed package. Everything it downloads, builds and
writes is below ``build/``, which can be deleted at any time.
"""
