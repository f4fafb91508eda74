# SPDX-License-Identifier: Apache-2.0
"""What errors say, carry, and make the command line exit with."""

from __future__ import annotations

import pickle

import pytest

from optpoline import errors
from optpoline.errors import (
    AddressTaken,
    ArenaError,
    ArenaFull,
    AttachError,
    ControllerActive,
    DecodeError,
    EncodeRangeError,
    ExclusionError,
    NoSites,
    NotesError,
    OperationError,
    OptpolineError,
    PermissionDenied,
    ProcessGone,
    SiteChanged,
    StopTimeout,
    TargetFault,
    ToolchainError,
    TransactionTimeout,
    Unsettled,
    UnsupportedTarget,
    UsageError,
)

EXAMPLES = (
    OptpolineError("something is wrong"),
    UsageError("no command was given"),
    NoSites("process 5 has no retpoline site"),
    AttachError("process 5 cannot be attached to"),
    ProcessGone(5),
    PermissionDenied("process 5 belongs to another user"),
    UnsupportedTarget("process 5 is a 32-bit program"),
    NotesError("a.out has two keys with one name"),
    Unsettled(),
    ArenaError("no room within reach"),
    ArenaFull(0x7000, "literals"),
    AddressTaken("the address was taken meanwhile"),
    SiteChanged(0x1000, b"\xe8\1", b"\xcc\1"),
    ControllerActive("process 9 already works on process 5"),
    StopTimeout(1_500_000, (7, 8)),
    TransactionTimeout(
        2.0, "thread 7 is between optpoline_read_begin and optpoline_read_end", (7,)
    ),
    TargetFault(0x2000, 16, "read"),
    ToolchainError("there is no compiler gcc"),
    DecodeError(0x3000, b"\x06" * 20),
    EncodeRangeError(0x1000, 0x7F00_0000_0000),
    ExclusionError("CPU 5 is offline"),
    OperationError(3, "0x4000 is no counter cell"),
)


def test_every_error_is_named_here() -> None:
    assert {type(error).__name__ for error in EXAMPLES} == set(errors.__all__)


@pytest.mark.parametrize(
    ("kind", "exit_code"),
    [
        (OptpolineError, 1),
        (UsageError, 2),
        (NoSites, 3),
        (AttachError, 1),
        (ProcessGone, 4),
        (PermissionDenied, 5),
        (UnsupportedTarget, 6),
        (ArenaError, 7),
        (AddressTaken, 7),
        (ArenaFull, 7),
        (SiteChanged, 7),
        (ControllerActive, 7),
        (StopTimeout, 7),
        (TargetFault, 1),
        (ToolchainError, 1),
        (DecodeError, 1),
        (EncodeRangeError, 7),
    ],
)
def test_exit_codes(kind: type[OptpolineError], exit_code: int) -> None:
    assert kind.exit_code == exit_code


@pytest.mark.parametrize("error", EXAMPLES, ids=lambda error: type(error).__name__)
def test_is_one_sentence(error: OptpolineError) -> None:
    text = str(error)
    assert text
    assert "\n" not in text
    assert not text.endswith(".")
    assert isinstance(error, OptpolineError)


def test_hint_follows_the_sentence() -> None:
    error = PermissionDenied("process 5 belongs to root", hint="run optpoline with sudo")
    assert str(error) == "process 5 belongs to root; run optpoline with sudo"
    assert (error.message, error.hint) == ("process 5 belongs to root", "run optpoline with sudo")
    assert NoSites("none").hint is None


def test_errors_carry_their_facts() -> None:
    changed = SiteChanged(0x1000, b"\xe8\1", b"\xcc\1")
    assert (changed.addr, changed.expected, changed.found) == (0x1000, b"\xe8\1", b"\xcc\1")
    assert "cc 01" in str(changed)
    assert "0x1000" in str(changed)
    late = StopTimeout(1_500_000, (7, 8))
    assert (late.waited_ns, late.tids) == (1_500_000, (7, 8))
    assert "1.5 ms" in str(late)
    assert "7, 8" in str(late)
    full = ArenaFull(0x7000, "literals")
    assert full.addr == 0x7000
    assert "0x7000 is used up: it has no room for more literals" in full.message
    fault = TargetFault(0x2000, 16, "read")
    assert (fault.addr, fault.size) == (0x2000, 16)
    assert str(fault) == "16 bytes at 0x2000 of the target cannot be read"
    decode = DecodeError(0x3000, b"\x06" * 20)
    assert (decode.addr, decode.code) == (0x3000, b"\x06" * 20)
    assert str(decode).count("06") == 16
    reach = EncodeRangeError(0x1000, 0x2000)
    assert (reach.src_addr, reach.dst_addr) == (0x1000, 0x2000)


def test_what_can_be_said_of_a_process_is() -> None:
    message = StopTimeout(1_500_000, (7,), pid=5).message
    assert message == "thread 7 of process 5 did not stop within 1.5 ms, and all were resumed"
    assert StopTimeout(1_500_000, (), pid=5).message.startswith("some threads of process 5 did")
    assert "0x1000 (the static call codec) are cc" in str(
        SiteChanged(0x1000, b"\xe8", b"\xcc", owner="the static call codec")
    )
    fault = TargetFault(0x2000, 16, "read", pid=5)
    assert fault.message == "16 bytes at 0x2000 of process 5 cannot be read"
    late = TransactionTimeout(2.0, "thread 7 is asleep", (7,), pid=5)
    assert late.message == "nothing was changed in process 5 within 2 s: thread 7 is asleep"


@pytest.mark.parametrize(
    "error",
    [
        ArenaFull(0x7000, "literals"),
        SiteChanged(0x1000, b"\xe8", b"\xcc"),
        StopTimeout(1_500_000, (7,)),
        TransactionTimeout(2.0, "thread 7 is asleep"),
        TargetFault(0x2000, 16, "read", pid=5),
    ],
    ids=lambda error: type(error).__name__,
)
def test_what_may_be_tried_is_said(error: OptpolineError) -> None:
    assert error.hint is not None


def test_process_gone_says_which() -> None:
    assert ProcessGone(5).pid == 5
    assert "process 5" in str(ProcessGone(5))
    assert str(ProcessGone(5, "it ran away")) == "it ran away"


@pytest.mark.parametrize("kind", [ProcessGone, PermissionDenied, UnsupportedTarget])
def test_what_keeps_us_from_attaching_can_be_caught_as_one(kind: type[AttachError]) -> None:
    assert issubclass(kind, AttachError)


def test_simple_errors_can_be_pickled() -> None:
    error = pickle.loads(pickle.dumps(NoSites("process 5 has no retpoline site")))
    assert str(error) == "process 5 has no retpoline site"
