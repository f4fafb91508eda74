# SPDX-License-Identifier: Apache-2.0
"""What a session offers of the static calls and keys that its program declares.

They are settings of the program's user, which no policy decides about: a session hands
them on, through the process that it has open already, and does nothing with them itself.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from optpoline.controller.commit import DEFAULT_TIMEOUT_S
from optpoline.controller.declared_handles import KeyHandle, StaticCallHandle, Transaction
from optpoline.controller.declared_program import DeclaredProgram
from optpoline.controller.target import Target

__all__ = ["DeclaringSession"]


class DeclaringSession(ABC):
    """The part of a session that changes static calls and keys."""

    _declared: DeclaredProgram | None = None

    @property
    @abstractmethod
    def target(self) -> Target:
        """The process; raises an error when the session is over."""

    def static_call(self, name: str) -> StaticCallHandle:
        """Return a static call that the program declares, to give it another target.

        What is set stays so after the session. See ``declared`` for programs without sites.

        Raises:
            OptpolineError: if the session is over.
            UsageError: if there is none of that name.
        """
        return self._declared_program().static_call(name)

    def key(self, name: str) -> KeyHandle:
        """Return a static key that the program declares, to switch it; likewise.

        Raises:
            OptpolineError: if the session is over.
            UsageError: if there is none of that name.
        """
        return self._declared_program().key(name)

    def transaction(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Transaction:
        """Begin changes of several keys and static calls that are made in one stop.

        Args:
            timeout_s: How long to wait for threads that are in the way.

        Raises:
            OptpolineError: if the session is over.
        """
        return self._declared_program().transaction(timeout_s=timeout_s)

    def _declared_program(self) -> DeclaredProgram:
        """Return what the program declares; read when first asked for."""
        target = self.target
        if self._declared is None:
            self._declared = DeclaredProgram(target)
        return self._declared

    def _close_settings(self) -> None:
        """Let what was handed out say that the session is over."""
        if self._declared is not None:
            self._declared.close()
