# SPDX-License-Identifier: Apache-2.0
"""What the machine offers to any session, as checks for ``doctor``.

Everything is read or tried on ourselves; no other process is looked at. Where the scripts
for debuggers and profilers are is said as well: they lie in the package.
"""

from __future__ import annotations

import ctypes
import os
import platform
from collections.abc import Iterator
from pathlib import Path

from optpoline.process.checks import Check, CheckStatus, Failure
from optpoline.process.priority import at_real_time

__all__ = ["check_machine"]

SUPPORTED_MACHINE = "x86_64"

SHARE_DIR = Path(__file__).parents[1] / "share"

MIN_KERNEL = (5, 4)
"""First release with waitid(P_PIDFD); pidfd_open and PTRACE_GET_SYSCALL_INFO are of 5.3."""


def check_machine(
    proc_root: Path = Path("/proc"),
    sys_root: Path = Path("/proc/sys"),
    sysfs_root: Path = Path("/sys"),
) -> tuple[Check, ...]:
    """Check the machine; the roots are parameters so that tests can fake them."""
    return (
        _check_cpu(proc_root),
        _check_kernel(sys_root),
        _check_memfd(),
        _check_rseq(),
        _check_priority(),
        _check_spectre_v2(sysfs_root),
        *_check_mem_writes(proc_root),
        _check_perf(sys_root),
        _check_script("gdb script", "optpoline-gdb.py", "names blocks and unwinds from them"),
        _check_script("perf script", "optpoline-perf.py", "makes perf name blocks"),
    )


def _check_cpu(proc_root: Path) -> Check:
    """The architecture is one we write code for."""
    machine = platform.machine()
    if machine != SUPPORTED_MACHINE:
        return Check(
            name="cpu",
            status=CheckStatus.FAIL,
            sentence=f"this is a {machine} machine; only x86-64 is supported",
            failure=Failure.UNSUPPORTED,
        )
    fields = dict.fromkeys(("vendor_id", "model name"), "unknown")
    for line in _read(proc_root / "cpuinfo").splitlines():
        name, colon, value = line.partition(":")
        if not colon:
            break
        if name.strip() in fields:
            fields[name.strip()] = value.strip()
    return _ok("cpu", f"x86-64, {fields['model name']} ({fields['vendor_id']})")


def _check_kernel(sys_root: Path) -> Check:
    """The kernel is recent enough."""
    release = _read(sys_root / "kernel/osrelease").strip() or platform.release()
    numbers = release.split("-")[0].split(".")
    try:
        version = int(numbers[0]), int(numbers[1])
    except (IndexError, ValueError):
        return _warn("kernel", f"Linux {release}: version not understood", None)
    wanted = ".".join(str(number) for number in MIN_KERNEL)
    if version < MIN_KERNEL:
        return Check(
            name="kernel",
            status=CheckStatus.FAIL,
            sentence=f"Linux {release} is too old; {wanted} is the least",
            failure=Failure.UNSUPPORTED,
        )
    return _ok("kernel", f"Linux {release} ({wanted} is the least)")


def _check_memfd() -> Check:
    """Arenas are memfds."""
    try:
        os.close(os.memfd_create("optpoline-doctor", os.MFD_CLOEXEC))
    except OSError as error:
        advice = "arenas need it; see whether a seccomp filter refuses it"
        return _warn("memfd", f"memfd_create does not work: {error.strerror}", advice)
    return _ok("memfd", "memfd_create works")


def _check_rseq() -> Check:
    """The C library registers rseq areas, which tell the CPU of a thread cheaply."""
    try:
        size = ctypes.c_uint.in_dll(ctypes.CDLL(None), "__rseq_size").value
    except (OSError, ValueError):
        size = 0
    if size:
        return _ok("rseq", "restartable sequences are registered by the C library")
    return _ok("rseq", "restartable sequences are not registered by the C library; not needed")


def _check_priority() -> Check:
    """Stops are at real-time priority where that is permitted: tried on ourselves, and undone."""
    with at_real_time() as is_raised:
        pass
    if not is_raised:
        return _warn(
            "priority",
            "no real-time priority for us: on busy CPUs the program is stopped for longer",
            "run optpoline as root (sudo), with CAP_SYS_NICE, or with RLIMIT_RTPRIO above 0",
        )
    return _ok("priority", "the program is stopped at real-time priority, which keeps stops short")


def _check_spectre_v2(sysfs_root: Path) -> Check:
    """Say what the kernel says about the reason for retpolines."""
    found = _read(sysfs_root / "devices/system/cpu/vulnerabilities/spectre_v2").strip()
    if not found:
        return _ok("spectre_v2", "the kernel does not say whether the CPU is affected")
    if found.startswith("Not affected"):
        return _ok(
            "spectre_v2",
            "this CPU is not affected: here programs would need no retpolines to begin with",
        )
    return _ok("spectre_v2", f"this CPU is affected, retpolines make sense (kernel: {found})")


def _check_mem_writes(proc_root: Path) -> Iterator[Check]:
    """Program text can be written through /proc/PID/mem (Linux 6.12 can forbid it)."""
    for word in _read(proc_root / "cmdline").split():
        name, _, value = word.partition("=")
        if name == "proc_mem.force_override" and value in {"never", "ptrace"}:
            yield _warn(
                "proc mem",
                f"the kernel was booted with {word}: writes to program text are restricted",
                "boot without it if an attach reports that text cannot be written",
            )


def _check_perf(sys_root: Path) -> Check:
    """Say whether program counters may be sampled, which finds sites that become hot later."""
    text = _read(sys_root / "kernel/perf_event_paranoid").strip()
    if not text:
        return _warn(
            "perf events",
            "not in this kernel: sites that become hot later are looked for by the clock, rarely",
            None,
        )
    return _ok("perf events", f"kernel.perf_event_paranoid is {text}; 2 or less is enough")


def _check_script(name: str, file_name: str, purpose: str) -> Check:
    """Say where a script for another tool is."""
    path = SHARE_DIR / file_name
    if not path.is_file():
        return _warn(name, f"{path} is missing", "install optpoline anew")
    return _ok(name, f"{purpose}: {path}")


def _read(path: Path) -> str:
    """Return the text of a file, "" if it cannot be read."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def _ok(name: str, sentence: str) -> Check:
    """A check that came out well."""
    return Check(name=name, status=CheckStatus.OK, sentence=sentence)


def _warn(name: str, sentence: str, advice: str | None) -> Check:
    """A check that may matter."""
    return Check(name=name, status=CheckStatus.WARN, sentence=sentence, advice=advice)
