# SPDX-License-Identifier: Apache-2.0
"""The loop: discover, learn, promote, patch, retire."""
