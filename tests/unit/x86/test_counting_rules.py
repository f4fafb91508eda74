# SPDX-License-Identifier: Apache-2.0
"""Learning blocks broken on purpose: each proof about memory and sequences is needed.

A block is taken apart into instructions; one of them is changed, or a word of a descriptor.
"""

from __future__ import annotations

import struct
from dataclasses import replace

import pytest

from optpoline.model import Addr, CounterRows
from optpoline.x86.block_rules import judge_block
from optpoline.x86.block_verdict import BlockRule, BlockScene
from tests.emulate.block_kinds import KINDS, LAYOUTS, Image, encode_image
from tests.emulate.disassemble import Insn, disassemble
from tests.unit.x86.test_block_rules import moved, put, rules_of, scene_of

PIE = LAYOUTS[1]
HIT = encode_image(KINDS["learn-known"](PIE, "rdx"), PIE)
CLAIM = encode_image(KINDS["learn-first"](PIE, "rdx"), PIE)
JUMP = encode_image(KINDS["learn-first-jump"](PIE, "rdx"), PIE)
SEGMENT = encode_image(KINDS["learn-known-segment"](PIE, "rdx"), PIE)
TRACED = encode_image(KINDS["traced"](PIE, "rdx"), PIE)
FAR = encode_image(KINDS["learn-far"](PIE, "rdx"), PIE)


def find(image: Image, mnemonic: str, text: str = "", number: int = 0) -> Insn:
    """Return an instruction of a block, by how it begins and what it names."""
    insns = disassemble(image.text, image.layout.block_addr)
    found = [insn for insn in insns if insn.mnemonic == mnemonic and text in insn.text]
    return found[number]


def after(insn: Insn) -> int:
    """Return the offset behind an instruction."""
    return insn.off + insn.size


def rows_of(image: Image) -> CounterRows:
    """Return the rows of a block."""
    assert image.plan.rows is not None
    return image.plan.rows


# --- the memory that is written


def test_a_cell_is_in_the_row_of_a_cpu() -> None:
    inc = find(HIT, "incq", "(%rdx)")
    at = after(inc) - 4
    size = rows_of(HIT).row_size
    assert BlockRule.COUNTER in rules_of(HIT, moved(HIT.code, at, size))
    assert BlockRule.COUNTER in rules_of(HIT, moved(HIT.code, at, -size))
    assert BlockRule.COUNTER in rules_of(HIT, moved(HIT.code, at, 4))
    assert rules_of(HIT, moved(HIT.code, at, 8)) == set()


def test_the_cpu_number_is_checked() -> None:
    compare = find(HIT, "cmpl", "%edx")
    assert BlockRule.COUNTER in rules_of(HIT, moved(HIT.code, after(compare) - 4, 1))
    assert rules_of(HIT, moved(HIT.code, after(compare) - 4, -1)) == set()
    # jbe, je, jb in place of jae; short or long.
    branch = find(HIT, "jae", number=1)
    for opcode in ("76", "74", "72"):
        assert BlockRule.COUNTER in rules_of(HIT, put(HIT.code, branch.off, opcode))
    # The bound of another register proves nothing of this one: cmp $4,%esi.
    other = put(HIT.code, compare.off + 1, "fe")
    assert rules_of(HIT, other) >= {BlockRule.COUNTER, BlockRule.OPERAND}


def test_the_row_is_where_rows_are() -> None:
    shift = find(HIT, "shlq", "%rdx")
    for wrong in (11, 13, 64 + 12):
        assert BlockRule.COUNTER in rules_of(HIT, put(HIT.code, after(shift) - 1, bytes([wrong])))
    # Another literal than the address of the first CPU's row, and a cell of the program's.
    add = find(HIT, "addq", "(%rip)", 1)
    assert BlockRule.COUNTER in rules_of(HIT, moved(HIT.code, after(add) - 4, -8))
    assert BlockRule.LITERAL in rules_of(HIT, moved(HIT.code, after(add) - 4, 0x10000))
    scene = scene_of(HIT)
    shifted = replace(rows_of(HIT), shared_addr=Addr(PIE.counter_addr + 8))
    assert BlockRule.COUNTER in rules_of(HIT, scene=replace(scene, rows=shifted))
    fewer = replace(rows_of(HIT), n_cpus=3)
    assert BlockRule.COUNTER in rules_of(HIT, scene=replace(scene, rows=fewer))
    low, _ = scene.counters
    smaller = replace(scene, counters=(low, low + rows_of(HIT).size - 8))
    assert BlockRule.COUNTER in rules_of(HIT, scene=smaller)


def test_every_way_to_a_commit_is_in_the_row() -> None:
    # One slot's offset, where ways meet: out of the row.
    add = find(CLAIM, "addq", "$", 1)
    at = after(add) - 4
    assert BlockRule.COUNTER in rules_of(CLAIM, moved(CLAIM.code, at, rows_of(CLAIM).row_size))
    assert BlockRule.COUNTER in rules_of(CLAIM, moved(CLAIM.code, at, -0x8000))
    assert rules_of(CLAIM, moved(CLAIM.code, at, 16)) == set()


def test_nothing_is_written_through_any_other_register() -> None:
    inc = find(HIT, "incq", "(%rdx)")
    for register in range(8):
        if register not in (2, 4):
            code = put(HIT.code, inc.off + 2, bytes([0x80 | register]))
            assert BlockRule.COUNTER in rules_of(HIT, code)
    # Of an address of 32 bits; with another segment.
    for prefix in ("67", "64", "65"):
        code = HIT.code[: inc.off] + bytes.fromhex(prefix) + HIT.code[inc.off :]
        assert rules_of(HIT, code)


def test_a_segment_limit_is_no_reason_to_count_without_lock() -> None:
    inc = find(SEGMENT, "lock incq", "(%rdx)")
    assert rules_of(SEGMENT) == set()
    assert SEGMENT.code[inc.off] == 0xF0
    # A second REX prefix in place of lock.
    assert BlockRule.SECTION in rules_of(SEGMENT, put(SEGMENT.code, inc.off, "48"))
    # The limit of one register for another.
    limit = find(SEGMENT, "lsll", "%edx")
    assert rules_of(SEGMENT, put(SEGMENT.code, limit.off + 2, "d1"))
    mask = find(SEGMENT, "andl", "%edx")
    wide = put(SEGMENT.code, after(mask) - 4, "ffffffff")
    # The compare bounds it all the same.
    assert rules_of(SEGMENT, wide) == set()
    selector = find(SEGMENT, "movl", "$0x7b")
    assert rules_of(SEGMENT, put(SEGMENT.code, after(selector) - 4, "73")) == {BlockRule.COUNTER}


def test_a_trace_stays_inside() -> None:
    mask = find(TRACED, "andl", "%edx")
    assert rules_of(TRACED) == set()
    twice = (2048 - 1).to_bytes(4, "little")
    assert rules_of(TRACED, put(TRACED.code, after(mask) - 4, twice)) == {BlockRule.COUNTER}
    half = (512 - 1).to_bytes(4, "little")
    assert rules_of(TRACED, put(TRACED.code, after(mask) - 4, half)) == set()
    shift = find(TRACED, "shlq", "$2, %rdx")
    assert rules_of(TRACED, put(TRACED.code, after(shift) - 1, "03")) == {BlockRule.COUNTER}
    store = find(TRACED, "movl", "(%rdx)")
    assert rules_of(TRACED, moved(TRACED.code, after(store) - 8, 4)) == {BlockRule.COUNTER}


def test_locked_cells_are_counters() -> None:
    for image, mnemonic, tail in ((JUMP, "lock incq", 4), (JUMP, "lock btsq", 5)):
        insn = find(image, mnemonic, "(%rip)")
        at = after(insn) - tail
        assert rules_of(image, moved(image.code, at, -0x10000)) == {BlockRule.COUNTER}
        assert rules_of(image, moved(image.code, at, 4)) == {BlockRule.COUNTER}
    xadd = find(TRACED, "lock xaddq")
    assert rules_of(TRACED, moved(TRACED.code, after(xadd) - 4, -0x10000)) == {BlockRule.COUNTER}


# --- what is given back


def test_the_operand_is_given_back_as_it_was() -> None:
    for number in (1, 2):  # behind the commit, and in the abort handler
        load = find(HIT, "leaq", "%rdx", number)
        assert rules_of(HIT, moved(HIT.code, after(load) - 4, 8)) == {BlockRule.RESTORE}
    # From another literal, on the way to the thunk.
    load = find(FAR, "movq", "(%rip), %rdx")
    assert rules_of(FAR, moved(FAR.code, after(load) - 4, -8)) == {BlockRule.RESTORE}
    assert BlockRule.LITERAL in rules_of(FAR, moved(FAR.code, after(load) - 4, 4))


def test_the_scratch_register_is_given_back() -> None:
    for number in (0, 1):
        load = find(CLAIM, "movq", "-8(%rsp), %rax", number)
        # Another register; another place.
        assert BlockRule.RESTORE in rules_of(CLAIM, put(CLAIM.code, load.off + 2, "8c"))
        assert rules_of(CLAIM, moved(CLAIM.code, after(load) - 4, -8))
    save = find(CLAIM, "movq", "%rax, -8(%rsp)")
    assert rules_of(CLAIM, put(CLAIM.code, save.off + 2, "8c"))
    assert rules_of(CLAIM, moved(CLAIM.code, after(save) - 4, 8))


def test_below_the_stack_only_where_that_is_dead() -> None:
    jump = replace(scene_of(CLAIM), is_below_stack_free=False)
    assert BlockRule.STACK in rules_of(CLAIM, scene=jump)
    assert rules_of(JUMP, scene=replace(scene_of(JUMP), is_below_stack_free=False)) == set()


def test_a_block_that_counts_nothing_may_do_none_of_this() -> None:
    for image in (HIT, CLAIM, JUMP, SEGMENT, TRACED, FAR):
        scene = replace(scene_of(image), rows=None)
        found = rules_of(image, scene=scene)
        assert BlockRule.UNKNOWN_INSN in found
        assert (BlockRule.DESCRIPTOR in found) is (image.text != image.code)


# --- sequences


def test_rseq_cs_is_cleared_wherever_the_block_is_left() -> None:
    for number in (0, 1):
        clear = find(CLAIM, "movq", "$0, %fs:", number)
        # Of the bytes before it: another field of the thread's.
        wrong = moved(CLAIM.code, clear.off + 5, 8)
        assert rules_of(CLAIM, wrong) >= {BlockRule.RESTORE}
        # Not with 0.
        assert BlockRule.SECTION in rules_of(CLAIM, put(CLAIM.code, after(clear) - 4, "01"))


def test_rseq_cs_points_at_the_sequence_that_follows() -> None:
    # The first hit's, at the second's descriptor; at none.
    load = find(HIT, "leaq", "%rdx")
    assert BlockRule.SECTION in rules_of(HIT, moved(HIT.code, after(load) - 4, 32))
    assert BlockRule.SECTION in rules_of(HIT, moved(HIT.code, after(load) - 4, 8))
    store = find(HIT, "movq", "%rdx, %fs:")
    assert BlockRule.SECTION in rules_of(HIT, moved(HIT.code, after(store) - 4, 8))
    # The CPU number, from elsewhere in the thread's memory: cpu_id_start.
    number = find(HIT, "movl", "%fs:")
    assert rules_of(HIT, moved(HIT.code, after(number) - 4, -4))


def descriptors(image: Image) -> int:
    """Return the offset of the first descriptor."""
    return -(-len(image.text) // 32) * 32


@pytest.mark.parametrize(
    ("field", "delta"),
    [
        (0, 1),  # version
        (4, 1),  # flags
        (8, 1),  # start_ip, inside an instruction
        (8, -9),  # start_ip, at the store to rseq_cs
        (16, 1),  # post_commit_offset
        (16, 13),  # with the store that clears rseq_cs
        (16, -8),
        (24, 1),  # abort_ip
        (24, -7),  # at the signature
        (24, 13),  # behind the store that clears rseq_cs
    ],
)
def test_fields_of_a_descriptor(field: int, delta: int) -> None:
    off = descriptors(HIT) + 32 + field
    width = 4 if field < 8 else 8
    value = int.from_bytes(HIT.code[off : off + width], "little") + delta
    found = rules_of(HIT, put(HIT.code, off, value.to_bytes(width, "little")))
    assert found & {BlockRule.DESCRIPTOR, BlockRule.SECTION}


def test_an_abort_handler_is_not_inside_and_behind_its_signature() -> None:
    off = descriptors(HIT) + 32
    start, size, abort = struct.unpack_from("<QQQ", HIT.code, off + 8)
    assert start + size < abort
    for wrong in (start, start + 8, start + size):
        code = put(HIT.code, off + 24, struct.pack("<Q", wrong))
        assert BlockRule.DESCRIPTOR in rules_of(HIT, code)
    for byte in range(1, 5):
        at = abort - PIE.block_addr - byte
        code = put(HIT.code, at, bytes([HIT.code[at] ^ 1]))
        assert BlockRule.DESCRIPTOR in rules_of(HIT, code)
    scene = scene_of(HIT)
    rseq = rows_of(HIT).rseq
    assert rseq is not None
    other = replace(rows_of(HIT), rseq=replace(rseq, signature=0x1234))
    assert BlockRule.DESCRIPTOR in rules_of(HIT, scene=replace(scene, rows=other))


def test_the_tail_is_descriptors_and_padding() -> None:
    size = descriptors(HIT) - len(HIT.text)
    assert 0 < size < 32
    assert BlockRule.DESCRIPTOR in rules_of(HIT, put(HIT.code, len(HIT.text), "90"))
    assert BlockRule.DESCRIPTOR in rules_of(HIT, HIT.code[:-8])
    assert BlockRule.DESCRIPTOR in rules_of(HIT, HIT.code[: descriptors(HIT)])
    assert BlockRule.SECTION in rules_of(HIT, HIT.code[:-32])


@pytest.mark.parametrize("text_size", [0, -1, 8, 1 << 20])
def test_text_sizes_that_are_wrong(text_size: int) -> None:
    scene: BlockScene = replace(scene_of(HIT), text_size=text_size)
    assert judge_block(HIT.code, PIE.block_addr, scene).faults


def test_a_commit_ends_its_sequence() -> None:
    # The claim's two stores the other way round: count, then store the target.
    store, inc = find(CLAIM, "movq", "%rdx, (%rax)"), find(CLAIM, "incq", "8(%rax)")
    assert after(store) == inc.off
    swapped = put(
        CLAIM.code,
        store.off,
        CLAIM.code[inc.off : after(inc)] + CLAIM.code[store.off : inc.off],
    )
    assert BlockRule.SECTION in rules_of(CLAIM, swapped)


def test_who_is_in_a_sequence_came_by_its_start() -> None:
    # The guard leads behind the store to rseq_cs.
    guard = find(HIT, "je")
    store = find(HIT, "movq", "%rdx, %fs:")
    far = store.off + store.size - after(guard)
    code = put(HIT.code, after(guard) - 4, far.to_bytes(4, "little"))
    if guard.size == 2:
        code = put(HIT.code, after(guard) - 1, bytes([far]))
    assert BlockRule.SECTION in rules_of(HIT, code)


def test_signatures_have_no_other_place() -> None:
    mark = find(HIT, "ud1l")
    assert BlockRule.STRAY in rules_of(HIT, put(HIT.code, mark.off - 1, "90"))
    one = encode_image(KINDS["one"](PIE, "rdx"), PIE)
    assert rules_of(one, one.code + bytes.fromhex("0fb93d53300553"))
