# SPDX-License-Identifier: Apache-2.0
"""Records of a session turned into text and JSON; nothing here looks into a process."""
