# SPDX-License-Identifier: Apache-2.0
"""Programs built with the GCC plugin: do they work, is each branch noted, what does it cost."""
