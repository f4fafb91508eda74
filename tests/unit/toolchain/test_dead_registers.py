# SPDX-License-Identifier: Apache-2.0
"""Registers that the plugin promises to be dead: programs that overwrite them work all the same.

Each branch with a promise is made two instructions, as its block would do it: its target is
loaded into that register, and is still there wherever the branch leads.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.unit.toolchain.conftest import ROOT

TARGETS = ROOT / "tests" / "targets"

_BRANCH = re.compile(
    r"^\.Loptpoline_plugin_insn(\d+):\n(?:#NO_APP\n)?\t(?:notrack )?(call|jmp)\t"
    r"\*([^%\n].*|%fs:.*)$",
    re.M,
)
_NOTE = re.compile(
    r"\t\.long \.Loptpoline_plugin_site(\d+)-\.\n\t\.long \.Loptpoline_plugin_string(\d+)-\.$", re.M
)
_TEXT = re.compile(r'^\.Loptpoline_plugin_string(\d+):\n\t\.string "(.*)"$', re.M)


def load_first(text: str) -> tuple[str, dict[str, int]]:
    """Have assembly load the target of each branch that has a promise.

    Returns:
        The assembly, and how many branches each register was promised for.
    """
    texts = dict(_TEXT.findall(text))
    promised = {number: texts[name] for number, name in _NOTE.findall(text)}
    used: dict[str, int] = {}

    def replace(found: re.Match[str]) -> str:
        number, branch, operand = found.groups()
        name = promised.get(number)
        if name is None:
            return found[0]
        used[name] = used.get(name, 0) + 1
        register = f"%{name}" if name[0] == "r" else f"%r{name}"
        return (
            f".Loptpoline_plugin_insn{number}:\n"
            f"\tmovq\t{operand}, {register}\n\t{branch}\t*{register}"
        )

    return _BRANCH.sub(replace, text), used


def build(source: Path, flags: tuple[str, ...], plugin: Path, directory: Path) -> dict[str, int]:
    """Build a program whose branches load first; return which registers they use."""
    assembly = directory / "program.s"
    argv = ["gcc", f"-fplugin={plugin}", *flags, "-S", str(source), "-o", str(assembly)]
    subprocess.run(argv, check=True, timeout=60)
    text, used = load_first(assembly.read_text())
    assembly.write_text(text)
    argv = ["gcc", *flags, "-pthread", str(assembly), "-o", str(directory / "program")]
    subprocess.run(argv, check=True, timeout=60)
    return used


@pytest.mark.parametrize(
    ("flags", "registers"),
    [
        (("-O1",), {"r11"}),
        (("-O2",), {"r11"}),
        (("-O3", "-fno-omit-frame-pointer"), {"r11"}),
        (("-Os", "-fcf-protection=full"), {"r11"}),
        (("-O2", "-ffixed-r11"), {"r10", "r9"}),
        (("-O2", "-fcall-saved-r11", "-fcall-saved-r10"), {"r9"}),
    ],
    ids=lambda value: " ".join(sorted(value)),
)
def test_few_registers_are_free(
    plugin: Path, tmp_path: Path, flags: tuple[str, ...], registers: set[str]
) -> None:
    used = build(TARGETS / "registers.c", flags, plugin, tmp_path)
    assert set(used) >= registers
    if registers != {"r11"}:
        assert "r11" not in used
    assert sum(used.values()) >= 5
    subprocess.run([tmp_path / "program"], check=True, timeout=10)


@pytest.mark.parametrize("flags", [("-O2",), ("-O3", "-fno-pie", "-no-pie")], ids=" ".join)
def test_each_form_of_operand(plugin: Path, tmp_path: Path, flags: tuple[str, ...]) -> None:
    used = build(TARGETS / "through_memory.c", (*flags, "-pthread"), plugin, tmp_path)
    assert sum(used.values()) >= 8
    said = subprocess.run(
        [tmp_path / "program"],
        check=True,
        timeout=10,
        input="1\n0\n",
        text=True,
        capture_output=True,
    )
    assert said.stdout.endswith("wrong 0\n")


FAULTING = """
int call(int (**table)(int), int i) { return table[i](i) + 1; }
"""


def test_no_promise_where_a_fault_is_an_exception(plugin: Path, tmp_path: Path) -> None:
    source = tmp_path / "faulting.c"
    source.write_text(FAULTING)
    argv = ["gcc", f"-fplugin={plugin}", "-O2", "-S", str(source), "-o", "-"]
    for flag, n_promised in (("-fexceptions", 1), ("-fnon-call-exceptions", 0)):
        done = subprocess.run([*argv, flag], check=True, timeout=60, capture_output=True, text=True)
        assert len(_NOTE.findall(done.stdout)) == n_promised
