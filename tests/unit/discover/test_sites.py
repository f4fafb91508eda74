# SPDX-License-Identifier: Apache-2.0
"""Sites found in compiled programs, compared with what objdump and capstone read."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import capstone
import pytest

from optpoline.discover import ModuleImage, SiteScan, find_sites
from optpoline.model import Refusal, Site, SiteKind, ThunkFlavour

Build = Callable[..., Path]
Strip = Callable[[Path], Path]

# "  401049:  e8 96 02 00 00   cs call 4012e4 <__x86_indirect_thunk_rax>"
_OBJDUMP_LINE = re.compile(
    r"^\s*([0-9a-f]+):\t([0-9a-f ]+?)\s*\t(?:cs |ds )*"
    r"(call|jmp|j\w+)(?:,p[nt])?\s+[0-9a-f]+ <__(?:x86_indirect_thunk|llvm_retpoline)_(\w+)>$"
)


def scan(program: Path) -> SiteScan:
    return find_sites(ModuleImage.from_file(str(program)))


def read_with_objdump(program: Path) -> set[tuple[int, bytes, str, str]]:
    """Return address, code, mnemonic and register of each branch to a named thunk."""
    listing = subprocess.run(
        ["objdump", "-dw", str(program)], check=True, capture_output=True, text=True
    )
    matches = (_OBJDUMP_LINE.match(line) for line in listing.stdout.splitlines())
    return {(int(m[1], 16), bytes.fromhex(m[2]), m[3], m[4]) for m in matches if m}


def as_objdump(site: Site) -> tuple[int, bytes, str, str]:
    mnemonic = "call" if site.kind is SiteKind.CALL else "jmp"
    return site.addr, site.code, mnemonic, site.thunk.operand


VARIANTS = [
    "-O0",
    "-O2",
    "-O2 -no-pie -fno-pie",
    "-O2 -no-pie -fno-pie -static",
    "-O2 -shared -fPIC -DNO_MAIN",
    "-O2 -mindirect-branch-cs-prefix",
    "-O2 -mindirect-branch-register",
    "-O3 -flto",
    "-O2 -Wl,-z,noseparate-code",
]


@pytest.mark.parametrize("options", VARIANTS)
def test_same_sites_as_objdump(build: Build, strip: Strip, options: str) -> None:
    program = build("sites_basic.c", "-mindirect-branch=thunk", *options.split())
    expected = read_with_objdump(program)
    found = scan(program)
    assert len(expected) >= 5
    assert {as_objdump(site) for site in found.sites} == expected
    assert {site.refusal for site in found.sites} <= {None, Refusal.PAGE_CROSSING}
    assert all(thunk.flavour is ThunkFlavour.GCC and thunk.symbol for thunk in found.thunks)
    assert all(site.function and site.function_addr for site in found.sites)
    stripped = scan(strip(program))
    assert {as_objdump(site) for site in stripped.sites} == expected
    assert {site.refusal for site in stripped.sites} == {site.refusal for site in found.sites}
    assert found.n_inline == stripped.n_inline == 0
    assert found.n_unverified == stripped.n_unverified == 0


def test_cs_prefix_is_part_of_the_site(build: Build) -> None:
    program = build(
        "sites_basic.c", "-O2", "-mindirect-branch=thunk", "-mindirect-branch-cs-prefix"
    )
    prefixed = [site for site in scan(program).sites if site.code[0] == 0x2E]
    assert prefixed
    assert all(len(site.code) == 6 and site.disp_addr == site.addr + 2 for site in prefixed)


def test_functions_are_named(build: Build) -> None:
    found = scan(build("sites_basic.c", "-O2", "-mindirect-branch=thunk"))
    names = {site.function for site in found.sites}
    assert {"call_one", "tail_one", "call_many", "interpret"} <= names


def test_virtual_calls(build: Build, strip: Strip) -> None:
    program = build(
        "sites_virtual.cc", "-O2", "-mindirect-branch=thunk", "-lstdc++", name="virtual"
    )
    expected = read_with_objdump(program)
    assert expected
    assert {as_objdump(site) for site in scan(program).sites} == expected
    assert {as_objdump(site) for site in scan(strip(program)).sites} == expected


def test_inline_thunks_are_counted(build: Build, strip: Strip) -> None:
    for level in ("-O0", "-O2"):
        program = build("sites_basic.c", level, "-mindirect-branch=thunk-inline")
        named, stripped = scan(program), scan(strip(program))
        assert named.sites == stripped.sites == ()
        assert named.n_inline == stripped.n_inline >= 5


def test_own_thunks(build: Build) -> None:
    program = build("sites_basic.c", "sites_extern.S", "-O2", "-mindirect-branch=thunk-extern")
    found = scan(program)
    thunk_addrs = {thunk.addr for thunk in found.thunks}
    listed = read_with_objdump(program)
    expected = {row for row in listed if row[0] not in thunk_addrs}
    assert len(expected) == len(listed) - 1
    assert {as_objdump(site) for site in found.sites} == expected
    assert len(found.thunks) == 16
    assert {thunk.flavour for thunk in found.thunks} == {ThunkFlavour.EXTERN}


def test_thunks_of_another_module_are_counted(build: Build, tmp_path: Path) -> None:
    build("sites_extern.S", "-shared", name="libthunks.so")
    program = build(
        "sites_basic.c",
        *("-O2", "-mindirect-branch=thunk-extern", f"-L{tmp_path}", "-lthunks"),
    )
    listing = subprocess.run(
        ["objdump", "-d", str(program)], check=True, capture_output=True, text=True
    ).stdout
    expected = len(re.findall(r"\t(?:call|jmp) .*<__x86_indirect_thunk_\w+@plt>", listing))
    found = scan(program)
    assert (found.sites, found.thunks) == ((), ())
    assert found.n_via_plt == expected >= 5


def test_bodies_without_names(build: Build, strip: Strip) -> None:
    program = build("sites_bodies.S", "-nostdlib", "-static")
    symbols = subprocess.run(
        ["nm", str(program)], check=True, capture_output=True, text=True
    ).stdout
    addrs = {line.split()[2]: int(line.split()[0], 16) for line in symbols.splitlines()}
    found = scan(strip(program))
    assert [(thunk.addr, thunk.operand, thunk.flavour) for thunk in found.thunks] == [
        (addrs["padded_r11"], "r11", ThunkFlavour.CLANG),
        (addrs["kernel_rax"], "rax", ThunkFlavour.GCC),
        (addrs["lfence_r9"], "r9", ThunkFlavour.EXTERN),
        (addrs["lfence_rcx"], "rcx", ThunkFlavour.EXTERN),
    ]
    assert [(site.kind, site.thunk.operand, site.code[:-4].hex()) for site in found.sites] == [
        (SiteKind.CALL, "r11", "e8"),
        (SiteKind.CALL, "r11", "2ee8"),
        (SiteKind.COND_JUMP, "r11", "0f84"),
        (SiteKind.COND_JUMP, "rax", "2e0f85"),
        (SiteKind.CALL, "r9", "e8"),
        (SiteKind.CALL, "rcx", "e8"),
        (SiteKind.JUMP, "r11", "e9"),
    ]
    assert found.n_unverified == 1, "the decoy inside an immediate"
    # Every site by an independent decoder, from the caller's start.
    code = ModuleImage.from_file(str(program)).texts[0]
    disassembler = capstone.Cs(capstone.CS_ARCH_X86, capstone.CS_MODE_64)
    thunk_addrs = {thunk.addr for thunk in found.thunks}
    insns = disassembler.disasm(code.code_at(addrs["caller"], 64), addrs["caller"])
    branches = {
        (insn.address, bytes(insn.bytes))
        for insn in insns
        if insn.op_str.startswith("0x") and int(insn.op_str, 16) in thunk_addrs
    }
    assert {(site.addr, site.code) for site in found.sites} == branches


def test_refusals(build: Build) -> None:
    program = build("sites_flags.S", "-nostdlib", "-static")
    refusals = {site.function: site.refusal for site in scan(program).sites}
    assert refusals["pushed_target"] is Refusal.UNKNOWN_OPERAND
    assert refusals["FUNCTION_page_crossing"] is Refusal.PAGE_CROSSING
    assert refusals["no_function"] is Refusal.FLAGS_UNKNOWN
    assert refusals["live_call"] is None


def test_module_without_thunks(build: Build) -> None:
    found = find_sites(ModuleImage.from_file(str(build("sites_basic.c", "-O2"))), count_plain=True)
    assert (found.sites, found.thunks) == ((), ())
    assert found.n_plain_indirect is not None
    assert found.n_plain_indirect >= 5
