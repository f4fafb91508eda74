# SPDX-License-Identifier: Apache-2.0
"""Every exception that optpoline raises on purpose, with its exit status.

``str(error)`` is one sentence that names the object and what to do about it;
errors carry their facts as fields. ``OSError`` is wrapped once, at the system
call, with ``from``. Only the command line turns an error into a line on
standard error and an exit status.
"""

from __future__ import annotations

__all__ = [
    "AddressTaken",
    "ArenaError",
    "ArenaFull",
    "AttachError",
    "ControllerActive",
    "DecodeError",
    "EncodeRangeError",
    "ExclusionError",
    "NoSites",
    "NotesError",
    "OperationError",
    "OptpolineError",
    "PermissionDenied",
    "ProcessGone",
    "SiteChanged",
    "StopTimeout",
    "TargetFault",
    "ToolchainError",
    "TransactionTimeout",
    "Unsettled",
    "UnsupportedTarget",
    "UsageError",
]


class OptpolineError(Exception):
    """Base of all; ``exit_code`` is what the command line exits with.

    Args:
        message: One sentence naming the object and what went wrong.
        hint: What the user can do about it, one sentence, or None.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        """Keep the sentence and the advice apart, so that both can be shown."""
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """Return the sentence, with the advice behind it where there is one."""
        return f"{self.message}; {self.hint}" if self.hint else self.message


class UsageError(OptpolineError):
    """The command line or an argument of the API makes no sense."""

    exit_code = 2


class ToolchainError(OptpolineError):
    """A compiler, or something that comes with one, is missing or not what is needed."""


class NoSites(OptpolineError):
    """The target has no retpoline site; the message says what it has."""

    exit_code = 3


class AttachError(OptpolineError):
    """The target cannot be attached to."""


class ProcessGone(AttachError):
    """The target, or the thread in question, no longer exists.

    Args:
        pid: Process or thread id.
    """

    exit_code = 4

    def __init__(self, pid: int, message: str | None = None) -> None:
        """Name the process that is gone."""
        super().__init__(message or f"process {pid} has exited or never existed")
        self.pid = pid


class PermissionDenied(AttachError):
    """We may not trace the target; the message says exactly why."""

    exit_code = 5


class UnsupportedTarget(AttachError):
    """The target is of a kind we cannot or will not touch (32-bit, kernel thread, ...)."""

    exit_code = 6


class NotesError(UnsupportedTarget):
    """The notes of a module about declared sites are damaged, contradictory or too new."""


class Unsettled(UnsupportedTarget):
    """Processes are started faster than they can be looked at; later it may work."""

    def __init__(self) -> None:
        """Say so."""
        super().__init__(
            "processes are started faster than they can be looked at", hint="try again later"
        )


class ArenaError(OptpolineError):
    """No arena can be had: no room within reach, or a limit of the target forbids it."""

    exit_code = 7


class AddressTaken(ArenaError):
    """The program has mapped something of its own where an arena was to be."""


class ArenaFull(ArenaError):
    """An arena is used up; its sites go on as they are.

    Args:
        addr: Of the arena.
        what: What it has no room for any more, plural.
    """

    def __init__(self, addr: int, what: str) -> None:
        """Say what there is no room for."""
        super().__init__(
            f"the arena at {addr:#x} is used up: it has no room for more {what}",
            hint="detach and attach again to start with an empty one",
        )
        self.addr = addr


class SiteChanged(OptpolineError):
    """The bytes at an address are not what was expected; they are left as they are.

    Args:
        addr: Address compared.
        expected: Bytes that should have been there.
        found: Bytes that were there.
        owner: What they belong to, in words, or None.
    """

    exit_code = 7

    def __init__(
        self, addr: int, expected: bytes, found: bytes, *, owner: str | None = None
    ) -> None:
        """Keep what was compared."""
        place = f"{addr:#x}" if owner is None else f"{addr:#x} ({owner})"
        super().__init__(
            f"bytes at {place} are {found.hex(' ')}, not {expected.hex(' ')}",
            hint="somebody else has changed them: take a debugger's breakpoint away, and try again",
        )
        self.addr = addr
        self.expected = expected
        self.found = found


class ControllerActive(OptpolineError):
    """Another optpoline controller works on this target."""

    exit_code = 7


class StopTimeout(OptpolineError):
    """Some threads could not be stopped in time; all were resumed.

    Args:
        waited_ns: How long was waited.
        tids: Threads that did not stop, as far as they are known.
        pid: Their process, or None.
    """

    exit_code = 7

    def __init__(self, waited_ns: int, tids: tuple[int, ...], *, pid: int | None = None) -> None:
        """Name the threads that did not stop."""
        names = ", ".join(str(tid) for tid in tids)
        who = f"thread{'' if len(tids) == 1 else 's'} {names}" if tids else "some threads"
        if pid is not None:
            who += f" of process {pid}"
        # Also a note of a session that goes on, and tries again by itself.
        super().__init__(
            f"{who} did not stop within {waited_ns / 1e6:.1f} ms, and all were resumed",
            hint="it may work once the CPUs have less to do",
        )
        self.waited_ns = waited_ns
        self.tids = tids


class TransactionTimeout(OptpolineError):
    """Keys and calls could not be changed in time; nothing was.

    Args:
        waited_s: How long was tried.
        reason: What was in the way the last time.
        tids: The threads that were, as far as they are known.
        pid: Their process, or None.
    """

    exit_code = 7

    def __init__(
        self, waited_s: float, reason: str, tids: tuple[int, ...] = (), *, pid: int | None = None
    ) -> None:
        """Say what was in the way."""
        where = "" if pid is None else f" in process {pid}"
        super().__init__(
            f"nothing was changed{where} within {waited_s:.3g} s: {reason}",
            hint="try again, or with a longer timeout",
        )
        self.waited_s = waited_s
        self.reason = reason
        self.tids = tids


class OperationError(OptpolineError):
    """A vector of operations on counter cells cannot be run; none of it was done.

    Args:
        index: Of the operation that is at fault, counted from 0, or None.
        reason: What is wrong with it.
    """

    def __init__(self, index: int | None, reason: str) -> None:
        """Name the operation."""
        super().__init__(reason if index is None else f"operation {index}: {reason}")
        self.index = index


class ExclusionError(OptpolineError):
    """Counter cells cannot be had to ourselves in one way; another may do."""


class TargetFault(OptpolineError):
    """Memory of the target could not be read or written.

    Args:
        addr: First address of the access.
        size: Size of the access in bytes.
        what: What was to be done with it: "read", "written".
        pid: The process whose memory it is, or None, also where it is a file's.
    """

    def __init__(
        self, addr: int, size: int, what: str = "accessed", *, pid: int | None = None
    ) -> None:
        """Name the range that faulted."""
        owner = "the target" if pid is None else f"process {pid}"
        super().__init__(
            f"{size} bytes at {addr:#x} of {owner} cannot be {what}",
            hint=None if pid is None else "if it has unmapped them meanwhile, try again",
        )
        self.addr = addr
        self.size = size


class DecodeError(OptpolineError):
    """Bytes are not an instruction of the architecture.

    Args:
        addr: Address of the bytes.
        code: The bytes.
    """

    def __init__(self, addr: int, code: bytes) -> None:
        """Name the bytes."""
        super().__init__(f"no instruction at {addr:#x}: {code[:16].hex(' ')}")
        self.addr = addr
        self.code = code


class EncodeRangeError(OptpolineError):
    """A direct branch cannot reach from one address to another.

    Args:
        src_addr: Address of the branch.
        dst_addr: Address it should go to.
    """

    exit_code = 7

    def __init__(self, src_addr: int, dst_addr: int) -> None:
        """Name both ends."""
        super().__init__(f"a direct branch at {src_addr:#x} cannot reach {dst_addr:#x}")
        self.src_addr = src_addr
        self.dst_addr = dst_addr
