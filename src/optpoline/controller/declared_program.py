# SPDX-License-Identifier: Apache-2.0
"""Change the static calls and keys that a running program declares.

A change is a setting of its user: it stays when this controller ends, needs nothing of
ours in the program (no arena, no stub), and is read back from the program's own text and
data. All methods of one object must be called from one thread, because ptrace calls must
come from one OS thread.
"""

from __future__ import annotations

from optpoline.controller.arguments import validate_pid
from optpoline.controller.changes import CallChange, Change, KeyAction, KeyChange, plan_changes
from optpoline.controller.commit import DEFAULT_TIMEOUT_S, Plan, commit
from optpoline.controller.declared_functions import find_functions, listed
from optpoline.controller.declared_handles import (
    KeyHandle,
    Redirection,
    Request,
    StaticCallHandle,
    Transaction,
)
from optpoline.controller.declared_modules import DeclaredModules
from optpoline.controller.declared_state import summarise_calls, summarise_keys
from optpoline.controller.summary import KeySummary, StaticCallSummary
from optpoline.controller.target import Target
from optpoline.errors import OptpolineError, UsageError
from optpoline.process.permissions import check_attachable

__all__ = ["DeclaredProgram", "declared"]

_STOP_TIMEOUT_S = 2.0


def declared(pid: int) -> DeclaredProgram:
    """Open a running program to change its static calls and keys; nothing is changed yet.

    No session is needed, and one may work on the program meanwhile.

    Args:
        pid: The process.

    Raises:
        UsageError: if ``pid`` is no whole number from 1 up.
        ProcessGone: if there is no such process.
        PermissionDenied: if we may not trace it.
        UnsupportedTarget: if it is of a kind we do not handle.
        NotesError: if a module's notes are damaged or too new.
    """
    check_attachable(validate_pid(pid))
    program = DeclaredProgram(Target(pid, stop_timeout_s=_STOP_TIMEOUT_S), owns_target=True)
    try:
        program.refresh()
    except BaseException:
        program.close()
        raise
    return program


class DeclaredProgram:
    """The static calls and keys of a running program; make it with ``declared``.

    Args:
        target: The program.
        owns_target: Whether closing this closes that.
    """

    def __init__(self, target: Target, *, owns_target: bool = False) -> None:
        """Read nothing yet."""
        self._target = target
        self._owns_target = owns_target
        self._found = DeclaredModules(target)
        self._is_closed = False

    @property
    def pid(self) -> int:
        """The process."""
        return self._target.pid

    @property
    def _modules(self) -> DeclaredModules:
        """Its modules; what every look and every change begins with.

        Raises:
            OptpolineError: if it was closed.
        """
        if self._is_closed:
            raise OptpolineError(f"the work on what process {self.pid} declares is over")
        return self._found

    def refresh(self) -> None:
        """Look for modules that were loaded or unloaded since, as every change does by itself.

        Raises:
            NotesError: if a module's notes are damaged, contradict its text, or are too new.
        """
        self._modules.refresh()

    # --- looking

    @property
    def keys(self) -> tuple[KeySummary, ...]:
        """Every static key and what it is set to now, by name."""
        return self._modules.look(lambda modules: summarise_keys(modules, self._target.memory))

    @property
    def static_calls(self) -> tuple[StaticCallSummary, ...]:
        """Every static call and what it calls now, by name."""
        memory, symbol_at = self._target.memory, self._modules.symbol_at
        return self._modules.look(lambda modules: summarise_calls(modules, memory, symbol_at))

    # --- changing

    def static_call(self, name: str) -> StaticCallHandle:
        """Return a static call.

        Raises:
            UsageError: if there is none of that name.
        """
        return StaticCallHandle(self, name, self.apply)

    def key(self, name: str) -> KeyHandle:
        """Return a static key.

        Raises:
            UsageError: if there is none of that name.
        """
        return KeyHandle(self, name, self.apply)

    def transaction(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> Transaction:
        """Begin a transaction: changes that are made at once, at the end of its block.

        Args:
            timeout_s: How long to wait for threads that are between ``optpoline_read_begin``
                and ``_end``, or sleep in a call that must not be interrupted.
        """
        return Transaction(self, timeout_s=timeout_s)

    def apply(self, *requests: Request, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Make changes in one stop, or none of them; what the handles do.

        Returns:
            How many stores it took; 0 if all was so already.

        Raises:
            UsageError: if ``timeout_s`` is no length of time.
            TransactionTimeout: if threads were in the way all the time.
            SiteChanged: if a site holds somebody else's bytes.
            OptpolineError: if it cannot be done for another reason.
        """

        def make_plan() -> Plan:
            """Plan from what memory holds now."""
            modules = self._modules.refresh()
            offs = {one.readers_offset for one in modules if one.readers_offset is not None}
            changes = [self._resolve(request) for request in requests]
            return Plan(
                pokes=plan_changes(modules, changes, self._target.memory),
                readers_offsets=tuple(sorted(offs)),
            )

        return commit(self._target, make_plan, timeout_s=timeout_s)

    def reset(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Make every key and static call what it begins as; return how many were not."""
        requests: list[Request] = [
            KeyChange(name=key.name, action=KeyAction.RESET)
            for key in self.keys
            if key.is_set or key.is_torn or key.count != key.begins_on
        ]
        requests += [Redirection(name=c.name, function=None) for c in self.static_calls if c.is_set]
        self.apply(*requests, timeout_s=timeout_s)
        return len(requests)

    def finish(self, *, timeout_s: float = DEFAULT_TIMEOUT_S) -> int:
        """Finish what a controller that was killed has left half done; return how many things.

        Branches become what their key's count says, calls what their trampoline does.
        """
        requests: list[Request] = [
            KeyChange(name=key.name, action=KeyAction.FINISH) for key in self.keys if key.is_torn
        ]
        requests += [CallChange(name=c.name, addrs=()) for c in self.static_calls if c.is_torn]
        self.apply(*requests, timeout_s=timeout_s)
        return len(requests)

    def check(self, request: Request) -> None:
        """Raise an error for a change that cannot be, before it is collected or made.

        Raises:
            UsageError: if there is no such key, static call or function.
        """
        self._resolve(request)

    def _resolve(self, request: Request) -> Change:
        """Find what a change names; look for new modules where it is not known."""
        found = self._find(request)
        if found is None:
            self._modules.refresh()
            found = self._find(request)
        if found is None:
            raise self._unknown(request)
        return found

    def _find(self, request: Request) -> Change | None:
        """Find what a change names in the modules that are known."""
        match request:
            case Redirection():
                return find_functions(
                    self._modules, request.name, request.function, is_any=request.is_any
                )
            case KeyChange():
                return request if request.name in self._modules.key_names else None
            case CallChange():
                return request

    def _unknown(self, request: Request) -> UsageError:
        """Return the error for a name that there is not."""
        if isinstance(request, KeyChange):
            what, names = "static key", self._modules.key_names
        else:
            what, names = "static call", self._modules.call_names
        there = f"it has {listed(sorted(names))}" if names else f"it declares no {what}"
        return UsageError(f"process {self.pid} has no {what} {request.name}: {there}")

    # --- the end

    def close(self) -> None:
        """Release what this process holds; the program stays as it is."""
        self._is_closed = True
        if self._owns_target:
            self._target.close()

    def __enter__(self) -> DeclaredProgram:
        """Return itself."""
        return self

    def __exit__(self, *_: object) -> None:
        """Close it; what was changed stays."""
        self.close()
