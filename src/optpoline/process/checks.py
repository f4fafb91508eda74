# SPDX-License-Identifier: Apache-2.0
"""What a check is: one rule, how it came out, and what that means for an attach."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from optpoline.errors import AttachError, PermissionDenied, ProcessGone, UnsupportedTarget

__all__ = ["Check", "CheckStatus", "Diagnosis", "Failure", "failed", "passed", "warned"]


class CheckStatus(Enum):
    """How one check came out."""

    OK = "ok"
    WARN = "warn"
    FAIL = "fail"


class Failure(Enum):
    """Which error a failed check means at attach."""

    GONE = "gone"
    UNSUPPORTED = "unsupported"
    PERMISSION = "permission"
    REFUSED = "refused"
    """Another controller works on it; no rule of a ``Diagnosis``, which looks at the process."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One rule and how it applies here.

    Attributes:
        name: Short and fixed, for tables and scripts.
        status: Whether it stands in the way.
        sentence: What was found, without a full stop.
        advice: What to do about it, or None.
        failure: What it means for an attach; set exactly when ``status`` is FAIL.
    """

    name: str
    status: CheckStatus
    sentence: str
    advice: str | None = None
    failure: Failure | None = None

    def __post_init__(self) -> None:
        """Keep status and failure in step."""
        if (self.status is CheckStatus.FAIL) != (self.failure is not None):
            raise ValueError(f"check {self.name}: status and failure disagree")


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """All checks of one process.

    Attributes:
        pid: The process asked about.
        checks: In the order in which the kernel would ask.
    """

    pid: int
    checks: tuple[Check, ...]

    @property
    def failed(self) -> tuple[Check, ...]:
        """The checks that stand in the way of an attach."""
        return tuple(check for check in self.checks if check.status is CheckStatus.FAIL)

    def error(self) -> AttachError | None:
        """Return the error an attach would raise, or None where it would work."""
        failed = self.failed
        if not failed:
            return None
        first = failed[0]
        hint = first.advice
        if len(failed) > 1:
            more = f"`optpoline doctor {self.pid}` lists {len(failed) - 1} more reason"
            more += "s" if len(failed) > 2 else ""
            hint = f"{hint}; {more}" if hint else more
        match first.failure:
            case Failure.GONE:
                return ProcessGone(self.pid, first.sentence)
            case Failure.UNSUPPORTED:
                return UnsupportedTarget(first.sentence, hint=hint)
            case _:
                return PermissionDenied(first.sentence, hint=hint)


def passed(name: str, sentence: str) -> Check:
    """Return a rule that lets us."""
    return Check(name=name, status=CheckStatus.OK, sentence=sentence)


def warned(name: str, sentence: str, advice: str | None = None) -> Check:
    """Return a rule that may matter."""
    return Check(name=name, status=CheckStatus.WARN, sentence=sentence, advice=advice)


def failed(name: str, sentence: str, advice: str | None, failure: Failure) -> Check:
    """Return a rule that stands in the way."""
    return Check(
        name=name, status=CheckStatus.FAIL, sentence=sentence, advice=advice, failure=failure
    )
