# SPDX-License-Identifier: Apache-2.0
"""What declared calls and branches cost, instruction by instruction and in time."""
