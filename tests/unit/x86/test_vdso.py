# SPDX-License-Identifier: Apache-2.0
"""Return paths of vDSO code: the model against an emulator that runs it."""

from __future__ import annotations

import pytest
from unicorn import unicorn_const as un
from unicorn import x86_const as uc
from unicorn.unicorn import Uc

from optpoline.x86.vdso import ReturnPath, find_return_path

TEXT_ADDR = 0x10000
STACK_ADDR = 0x20000
RETURN_ADDR = 0x30000
CLEAR = "31d231c931f631ff4531c04531c94531d24531db"

# What GCC and Clang made of the clock functions' fallbacks, each behind its syscall.
PATHS = {
    # xor edx, edx ; ... ; ret
    "plain": ("0f05" + CLEAR + "c3", False, 0),
    # leave ; xor ... ; ret
    "leave": ("0f05c9" + CLEAR + "c3", True, 8),
    # lea rsp, [rbp-16] ; pop rbx ; pop r14 ; pop rbp ; xor ... ; ret
    "lea": ("0f05488d65f05b415e5d" + CLEAR + "c3", True, 8),
    # add rsp, 48 ; pop rbx ; pop r12 ; pop r13 ; pop r14 ; pop r15 ; pop rsi ; xor ... ; ret
    "pops": ("0f054883c4305b415c415d415e415f5e" + CLEAR + "c3", False, 96),
    # sub rsp, 8 ; pop rax ; pop rbp ; ret
    "down": ("0f054883ec0858 5dc3", False, 8),
}


def _find(code: str) -> ReturnPath | None:
    return find_return_path(bytes.fromhex(code), TEXT_ADDR)


@pytest.mark.parametrize("name", PATHS)
def test_model_against_emulator(name: str) -> None:
    code, from_rbp, ret_off = PATHS[name]
    path = _find(code)
    assert path is not None
    assert (path.from_rbp, path.ret_off) == (from_rbp, ret_off)
    assert path.code == bytes.fromhex(code)
    at = STACK_ADDR + 0x800
    rsp, rbp = path.stack_for(at)
    machine = Uc(un.UC_ARCH_X86, un.UC_MODE_64)
    machine.mem_map(TEXT_ADDR, 0x1000)
    machine.mem_map(STACK_ADDR, 0x1000)
    machine.mem_map(RETURN_ADDR, 0x1000)
    machine.mem_write(TEXT_ADDR, path.code)
    machine.mem_write(at, RETURN_ADDR.to_bytes(8, "little"))
    machine.reg_write(uc.UC_X86_REG_RSP, rsp)
    machine.reg_write(uc.UC_X86_REG_RBP, 0x1111 if rbp is None else rbp)
    reads: list[int] = []

    def on_read(_machine: object, _kind: int, addr: int, *_rest: object) -> None:
        reads.append(addr)

    machine.hook_add(un.UC_HOOK_MEM_READ, on_read)
    machine.emu_start(path.syscall_addr + 2, RETURN_ADDR, count=100)
    assert machine.reg_read(uc.UC_X86_REG_RIP) == RETURN_ADDR
    # rt_sigreturn takes its frame from 8 below the stack pointer.
    assert machine.reg_read(uc.UC_X86_REG_RSP) == at + 8
    # Whatever is popped lies in what is written for it.
    assert min(reads) >= min(rsp, at - ret_off + path.lowest_off)


@pytest.mark.parametrize(
    "code",
    [
        "0f05",  # runs off the end
        "0f0575fec3",  # jne
        "0f058b03c3",  # mov eax, [rbx]
        "0f058903c3",  # mov [rbx], eax
        "0f05ffe0",  # jmp rax
        "0f055cc3",  # pop rsp
        "0f055dc9c3",  # pop rbp ; leave
        "0f05c20800",  # ret 8
        "0f0589ecc3",  # mov esp, ebp
        "90c3",  # no syscall
    ],
)
def test_refused(code: str) -> None:
    assert _find(code) is None


def test_a_path_that_leaves_rbp_alone_is_preferred() -> None:
    path = _find(PATHS["leave"][0] + "cccc" + PATHS["plain"][0])
    assert path is not None
    assert not path.from_rbp
    path = _find("0f0575fec3" + PATHS["leave"][0])
    assert path is not None
    assert path.from_rbp
