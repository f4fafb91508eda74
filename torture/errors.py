# SPDX-License-Identifier: Apache-2.0
"""What may go wrong in the harness itself, as opposed to a figure that misses its bar."""

from __future__ import annotations

__all__ = ["MissingTool", "TortureError"]


class TortureError(Exception):
    """A sentence for the user: what could not be built, started or measured, and why."""


class MissingTool(TortureError):
    """A program that a row needs is not installed.

    Attributes:
        tool: The command that was not found.
        package: The Debian package that has it.
    """

    def __init__(self, tool: str, package: str) -> None:
        """Name the command and its package."""
        super().__init__(f"{tool} is not installed: apt install {package}")
        self.tool = tool
        self.package = package
