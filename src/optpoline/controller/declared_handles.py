# SPDX-License-Identifier: Apache-2.0
"""What a caller holds of static calls and keys: one of them by name, or changes of several.

Handles know names alone. Where a name leads is found out anew for each change, because
modules come and go; so a handle of what was unloaded says so, and works again when it is back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from optpoline.controller.changes import CallChange, KeyAction, KeyChange
from optpoline.controller.summary import KeyState, KeySummary, StaticCallSummary

__all__ = [
    "Changer",
    "KeyHandle",
    "Redirection",
    "Request",
    "StaticCallHandle",
    "Transaction",
]


@dataclass(frozen=True, slots=True, kw_only=True)
class Redirection:
    """What a static call shall call, by name: each plan finds it anew.

    Attributes:
        name: The static call.
        function: A target of it, or ``module:function``; None for what it called at first.
        is_any: Whether it may be any function.
    """

    name: str
    function: str | None
    is_any: bool = False


Request = KeyChange | CallChange | Redirection
Take = Callable[[Request], object]


class Changer(Protocol):
    """A program whose static calls and keys can be changed."""

    @property
    def keys(self) -> tuple[KeySummary, ...]:
        """Every static key."""

    @property
    def static_calls(self) -> tuple[StaticCallSummary, ...]:
        """Every static call."""

    def check(self, request: Request) -> None:
        """Raise an error for a change that cannot be."""

    def apply(self, *requests: Request, timeout_s: float) -> int:
        """Make changes in one stop, or none of them."""


class StaticCallHandle:
    """A static call by name, in every module that has it.

    Args:
        program: The program.
        name: Its name.
        take: What takes changes.
    """

    def __init__(self, program: Changer, name: str, take: Take) -> None:
        """Check that there is one."""
        self._program = program
        self._take = take
        self.name = name
        program.check(Redirection(name=name, function=None))

    @property
    def summary(self) -> StaticCallSummary:
        """How it stands."""
        return next(call for call in self._program.static_calls if call.name == self.name)

    @property
    def target(self) -> str | None:
        """What it calls now; None if its calls contradict each other."""
        return self.summary.target

    def update(self, function: str, *, any_function: bool = False) -> None:
        """Let it call another function.

        Args:
            function: A target that the source declares, or ``module:function``.
            any_function: Whether it may be any function, whose type nobody has compared.

        Raises:
            UsageError: if there is no such function, or it is out of reach.
        """
        request = Redirection(name=self.name, function=function, is_any=any_function)
        self._program.check(request)
        self._take(request)

    def reset(self) -> None:
        """Let it call what it called at first."""
        self._take(Redirection(name=self.name, function=None))


class KeyHandle:
    """A static key by name, in every module that has it.

    Args:
        program: The program.
        name: Its name.
        take: What takes changes.
    """

    def __init__(self, program: Changer, name: str, take: Take) -> None:
        """Check that there is one."""
        self._program = program
        self._take = take
        self.name = name
        program.check(KeyChange(name=name, action=KeyAction.FINISH))

    @property
    def summary(self) -> KeySummary:
        """How it stands."""
        return next(key for key in self._program.keys if key.name == self.name)

    @property
    def enabled(self) -> bool:
        """Whether it is enabled now, in every module."""
        return self.summary.state is KeyState.ON

    @property
    def count(self) -> int:
        """How often it is enabled."""
        return self.summary.count

    def enable(self) -> None:
        """Enable it; nothing if it is."""
        self._change(KeyAction.ENABLE)

    def disable(self) -> None:
        """Disable it, however often it is enabled."""
        self._change(KeyAction.DISABLE)

    def increment(self) -> None:
        """Enable it once more: it stays enabled until it was decremented as often."""
        self._change(KeyAction.INCREMENT)

    def decrement(self) -> None:
        """Take one ``increment`` back.

        Raises:
            UsageError: if it is not enabled.
        """
        self._change(KeyAction.DECREMENT)

    def reset(self) -> None:
        """Make it what it begins as."""
        self._change(KeyAction.RESET)

    def _change(self, action: KeyAction) -> None:
        """Hand a change on."""
        self._take(KeyChange(name=self.name, action=action))


class Transaction:
    """Changes that are made in one stop, or not at all; ``DeclaredProgram.transaction``.

    Once any thread has executed a site as it is after the transaction, no thread executes
    one as it was before.

    Args:
        program: The program.
        timeout_s: How long to wait for threads that are in the way.
    """

    def __init__(self, program: Changer, *, timeout_s: float) -> None:
        """Collect nothing yet."""
        self._program = program
        self._timeout_s = timeout_s
        self._requests: list[Request] = []

    def static_call(self, name: str) -> StaticCallHandle:
        """Return a static call whose changes are a part of the transaction."""
        return StaticCallHandle(self._program, name, self._requests.append)

    def key(self, name: str) -> KeyHandle:
        """Return a key whose changes are a part of the transaction."""
        return KeyHandle(self._program, name, self._requests.append)

    def commit(self) -> int:
        """Make the changes collected so far; return how many stores it took.

        Raises:
            TransactionTimeout: if threads were in the way all the time; nothing is changed.
        """
        requests = self._requests[:]
        self._requests.clear()
        return self._program.apply(*requests, timeout_s=self._timeout_s)

    def __enter__(self) -> Transaction:
        """Return itself."""
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        """Commit, unless the block raised an error."""
        if exc_type is None:
            self.commit()
