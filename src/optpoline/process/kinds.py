# SPDX-License-Identifier: Apache-2.0
"""The rules that decide whether a process is of a kind we can work on."""

from __future__ import annotations

import errno

from optpoline.process.checks import Check, Failure, failed, passed, warned
from optpoline.process.freezer import find_frozen_group
from optpoline.process.scene import CAP_SYS_ADMIN, Scene

__all__ = [
    "check_address_space",
    "check_architecture",
    "check_freezer",
    "check_kind",
    "check_seccomp",
    "check_shadow_stack",
]

# Seccomp field of /proc/PID/status, Documentation/filesystems/proc.rst
_SECCOMP_STRICT = 1

# <elf.h>: the machine we can write code for, and names for those we meet and cannot.
ELFCLASS64 = 2
ELFDATA2MSB = 2
EM_SUPPORTED = 62
EM_NAMES = {3: "i386", 8: "MIPS", 20: "PowerPC", 21: "PowerPC64", 22: "S390", 40: "ARM"} | {
    62: "x86-64",
    183: "AArch64",
    243: "RISC-V",
    258: "LoongArch",
}


def check_kind(scene: Scene) -> Check:
    """It is a running user process, the leader of its threads, and not ourselves."""
    theirs, name = scene.theirs, scene.name
    state = theirs.fields.get("State", "")[:1]
    leader = theirs.number("Tgid", scene.pid)
    if state in {"Z", "X", "x"}:
        parent = theirs.number("PPid")
        sentence = (
            f"{name} has exited: a zombie that its parent, process {parent}, has not collected"
        )
        return failed("kind", sentence, None, Failure.GONE)
    # "Kthread" exists since Linux 6.8; before, a process without memory is a kernel thread.
    kernel_thread = theirs.fields.get("Kthread", "0" if "VmSize" in theirs.fields else "1")
    if kernel_thread == "1":
        sentence = f"{name} is a kernel thread: it has no program to promote"
        return failed("kind", sentence, None, Failure.UNSUPPORTED)
    if "VmSize" not in theirs.fields:
        return failed("kind", f"{name} is exiting: it has no memory any more", None, Failure.GONE)
    if leader != scene.pid:
        sentence = f"{scene.pid} is a thread of process {leader}, not a process"
        return failed("kind", sentence, f"use PID {leader}", Failure.UNSUPPORTED)
    if scene.ours.number("Pid", -1) == scene.pid:
        sentence = f"{name} is optpoline itself, which cannot trace itself"
        return failed("kind", sentence, None, Failure.UNSUPPORTED)
    if state == "T":
        sentence = f"{name} is stopped by a signal"
        advice = f"nothing can be learnt until it runs: kill -CONT {scene.pid}"
        return warned("kind", sentence, advice)
    return passed("kind", f"{name} is a running user process")


def check_architecture(scene: Scene) -> Check:
    """Its executable is of the architecture we write code for."""
    try:
        with (scene.proc_dir / "exe").open("rb") as exe:
            header = exe.read(20)
    except OSError as error:
        if error.errno in {errno.EACCES, errno.EPERM}:
            sentence = "its executable cannot be read with our rights"
        else:
            sentence = f"its executable cannot be read ({error.strerror})"
        return warned("architecture", sentence)
    if len(header) < 20 or header[:4] != b"\x7fELF":
        sentence = f"the executable of {scene.name} is not an ELF file"
        return failed("architecture", sentence, None, Failure.UNSUPPORTED)
    machine = int.from_bytes(header[18:20], "big" if header[5] == ELFDATA2MSB else "little")
    machine_name = EM_NAMES.get(machine, f"of ELF machine {machine}")
    if header[4] != ELFCLASS64:
        sentence = f"{scene.name} is a 32-bit program ({machine_name})"
        advice = "only 64-bit x86-64 programs are supported"
        return failed("architecture", sentence, advice, Failure.UNSUPPORTED)
    if machine != EM_SUPPORTED:
        sentence = f"{scene.name} is a program for {machine_name}"
        advice = "only 64-bit x86-64 programs are supported"
        return failed("architecture", sentence, advice, Failure.UNSUPPORTED)
    return passed("architecture", f"its executable is 64-bit {machine_name}")


def check_seccomp(scene: Scene) -> Check:
    """No filter can kill it for a call that we need: none is set, or we may suspend it.

    Seccomp is set for each thread, and calls are run in one of them.
    """
    modes = [thread.number("Seccomp") for thread in scene.threads]
    n_filtered = sum(mode != 0 for mode in modes)
    if n_filtered == 0:
        return passed("seccomp", "its system calls are not filtered")
    kind = "only four system calls are allowed" if _SECCOMP_STRICT in modes else "a filter is set"
    # PTRACE_O_SUSPEND_SECCOMP wants CAP_SYS_ADMIN and a tracer that is not filtered itself.
    if scene.ours.has_cap(CAP_SYS_ADMIN) and scene.ours.number("Seccomp") == 0:
        sentence = f"it is under seccomp ({kind}), which is suspended for each call of ours"
        return warned("seccomp", sentence, "should we be killed during a call, it may be, too")
    advice = "run optpoline as root outside of a container, which may suspend seccomp"
    if n_filtered < len(modes):
        sentence = f"{n_filtered} of its {len(modes)} threads are under seccomp ({kind})"
        return warned("seccomp", f"{sentence}; calls are run in the others", advice)
    sentence = f"{scene.name} is under seccomp ({kind}): a call that we need could kill it"
    return failed("seccomp", sentence, advice, Failure.UNSUPPORTED)


def check_shadow_stack(scene: Scene) -> Check:
    """It has a thread without a hardware shadow stack (Linux 6.6, x86_Thread_features).

    A call can be injected only where a return address of ours need not be on one.
    Retpolines do not work on shadow stacks either.
    """
    features = [thread.fields.get("x86_Thread_features", "").split() for thread in scene.threads]
    n_shadowed = sum("shstk" in names for names in features)
    if n_shadowed == 0:
        return passed("shadow stack", "it has no hardware shadow stack")
    if n_shadowed < len(features):
        sentence = f"{n_shadowed} of its {len(features)} threads have a hardware shadow stack"
        return warned("shadow stack", f"{sentence}; calls are run in the others")
    sentence = f"{scene.name} has hardware shadow stacks (CET), on which calls cannot be injected"
    advice = "start it with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off"
    return failed("shadow stack", sentence, advice, Failure.UNSUPPORTED)


def check_freezer(scene: Scene) -> Check:
    """Its control group lets it run."""
    path = find_frozen_group(scene.proc_dir, scene.proc_root)
    if path is None:
        return passed("freezer", "it is not frozen by a control group")
    sentence = f"{scene.name} is frozen by its control group {path}"
    return failed("freezer", sentence, "thaw it first", Failure.UNSUPPORTED)


def check_address_space(scene: Scene) -> Check:
    """RLIMIT_AS leaves room for arenas."""
    try:
        lines = (scene.proc_dir / "limits").read_text().splitlines()
    except OSError:
        lines = []
    for line in lines:
        if line.startswith("Max address space"):
            soft = line.split()[3]
            if soft != "unlimited":
                sentence = f"its address space is limited to {soft} bytes (RLIMIT_AS)"
                advice = f"if no arena fits: prlimit --pid {scene.pid} --as=unlimited"
                return warned("address space", sentence, advice)
    return passed("address space", "its address space is not limited")
