# SPDX-License-Identifier: Apache-2.0
"""optpoline.h checks types when it is compiled, and can be switched off."""

from __future__ import annotations

import re
import subprocess
import textwrap
from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
PROJECT = ROOT / "tests" / "targets" / "declared"
INCLUDE = ROOT / "src" / "optpoline" / "share" / "include"

LANGUAGES = {"c": ("gcc", "-std=c11", "-x", "c"), "c++": ("g++", "-std=c++17", "-x", "c++")}
each_language = pytest.mark.parametrize("language", LANGUAGES)

HEAD = """
#include "optpoline.h"
int right(int value);
long wrong(long value);
DECLARE_STATIC_CALL(codec, right);
DYNAMIC_CALL_TABLE(handle, int, int);
"""


def compile_text(language: str, text: str, *flags: str) -> subprocess.CompletedProcess[str]:
    """Compile a unit as far as the compiler checks it."""
    command = [*LANGUAGES[language], "-fsyntax-only", "-Wall", "-Wextra", "-pedantic", *flags]
    return subprocess.run(
        [*command, f"-I{INCLUDE}", "-"], input=HEAD + text, capture_output=True, text=True
    )


@each_language
@pytest.mark.parametrize("flags", [(), ("-DOPTPOLINE_DISABLE",)], ids=["enabled", "disabled"])
@pytest.mark.parametrize(
    ("good", "bad", "message"),
    [
        (
            "STATIC_CALL_TARGET(codec, right);",
            "STATIC_CALL_TARGET(codec, wrong);",
            "wrong has another type than the static call codec",
        ),
        (
            "int f(int x) { return static_call(codec)(x); }",
            "int f(void) { return static_call(codec)(); }",
            "too few arguments",
        ),
        (
            "int f(int x) { return dynamic_call(handle, right, x); }",
            "int f(int x) { return dynamic_call(handle, wrong, x); }",
            "to functions of another type than the table handle|invalid conversion",
        ),
        (
            "int f(int (*p)(int)) { return dynamic_call(handle, p, 1); }",
            "int f(int (*p)(int)) { return dynamic_call(handle, p, 1, 2); }",
            "too many arguments",
        ),
        (
            "int f(int (*p)(int)) { return dynamic_call(handle, p, 1); }",
            "int f(int (*p)(int)) { return dynamic_call(handel, p, 1); }",
            "handel",
        ),
    ],
)
def test_types_are_checked(
    language: str, flags: tuple[str, ...], good: str, bad: str, message: str
) -> None:
    done = compile_text(language, good, *flags)
    assert (done.returncode, done.stderr) == (0, "")
    done = compile_text(language, bad, *flags)
    assert done.returncode != 0
    assert any(part in done.stderr for part in message.split("|"))


@pytest.mark.parametrize("compiler", ["g++", "clang++"])
@pytest.mark.parametrize("flags", [(), ("-DOPTPOLINE_DISABLE",)], ids=["enabled", "disabled"])
def test_a_static_call_may_be_given_what_throws_nothing(
    compiler: str, flags: tuple[str, ...]
) -> None:
    head = """
    #include "optpoline.h"
    int throwing(int);
    int silent(int) noexcept;
    long other(long) noexcept;
    """
    good = "DECLARE_STATIC_CALL(codec, throwing); STATIC_CALL_TARGET(codec, silent);"
    for text, is_good in (
        (good, True),
        (good.replace("silent", "other"), False),
        ("DECLARE_STATIC_CALL(codec, silent); STATIC_CALL_TARGET(codec, throwing);", False),
    ):
        command = [compiler, "-std=c++17", "-fsyntax-only", "-x", "c++", *flags, f"-I{INCLUDE}"]
        done = subprocess.run([*command, "-"], input=head + text, capture_output=True, text=True)
        assert (done.returncode == 0) == is_good, done.stderr
        assert is_good or "has another type than the static call codec" in done.stderr


@each_language
def test_disabled_the_program_is_the_same_and_has_no_notes(language: str, tmp_path: Path) -> None:
    path = tmp_path / "program"
    command = [*LANGUAGES[language], "-O1", "-DOPTPOLINE_DISABLE", "-Wall", "-Wextra", "-pedantic"]
    sources = [str(PROJECT / "main.c"), str(PROJECT / "other.c")]
    done = subprocess.run(
        [*command, f"-I{INCLUDE}", *sources, "-o", str(path)], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([str(path)]).returncode == 0
    assert b"optpoline\0" not in path.read_bytes()


@each_language
def test_the_program_of_the_manual(language: str, tmp_path: Path) -> None:
    manual = (ROOT / "docs" / "declared.md").read_text()
    after = manual.split("## A program with all three\n\n", 1)[1]
    block = re.match(r"(?:    .*\n|\n)+", after)
    assert block is not None
    path = tmp_path / "program"
    command = [*LANGUAGES[language], "-O2", "-Wall", "-Wextra", "-pedantic", f"-I{INCLUDE}"]
    done = subprocess.run(
        [*command, "-", "-o", str(path)],
        input=textwrap.dedent(block[0]),
        capture_output=True,
        text=True,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert subprocess.run([str(path)], capture_output=True, text=True).stdout == "73\n"


@each_language
@pytest.mark.parametrize("lto", ["-fno-lto", "-flto"])
def test_definitions_are_taken_from_an_archive(language: str, lto: str, tmp_path: Path) -> None:
    head = '#include "optpoline.h"\nint codec(int);\n'
    (tmp_path / "defined.c").write_text(
        head + "DEFINE_STATIC_KEY_TRUE(trace);\nDEFINE_STATIC_CALL_RET0(size, codec);\n"
    )
    (tmp_path / "main.c").write_text(
        head + "DECLARE_STATIC_KEY_TRUE(trace);\nDECLARE_STATIC_CALL(size, codec);\n"
        "int main(void) { return static_branch_likely(&trace) ? static_call(size)(7) : 3; }\n"
    )
    compiler = [*LANGUAGES[language], "-O1", lto, f"-I{INCLUDE}"]
    for command in (
        [*compiler, "-c", "defined.c", "main.c"],
        ["gcc-ar", "rcs", "libdefined.a", "defined.o"],
        [compiler[0], "-O1", lto, "main.o", "libdefined.a", "-o", "program"],
        ["./program"],
    ):
        subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)


def test_exceptions_pass_through_static_and_dynamic_calls(tmp_path: Path) -> None:
    text = """
    #include "optpoline.h"
    #include <string>
    struct Guard { int &left; ~Guard() { left++; } };
    static int thrower(std::string text) { throw text.size(); }
    namespace inner { DEFINE_STATIC_CALL(risky, thrower); }
    DYNAMIC_CALL_TABLE(any, int, std::string);
    template <typename Run> int caught(Run run)
    {
        int left = 0;
        try { Guard guard{left}; return run(); }
        catch (std::string::size_type size) { return int(size) + left; }
    }
    int main()
    {
        using namespace inner;
        return caught([] { return static_call(risky)("four"); }) == 5
            && caught([] { return dynamic_call(any, thrower, "seven") ; }) == 6 ? 0 : 1;
    }
    """
    path = tmp_path / "program"
    for level in ("-O0", "-O2"):
        command = [*LANGUAGES["c++"], level, "-Wall", "-Wextra", f"-I{INCLUDE}", "-", "-o", path]
        subprocess.run(command, input=text, text=True, check=True)
        assert subprocess.run([path]).returncode == 0


@each_language
def test_a_name_is_defined_once(language: str, tmp_path: Path) -> None:
    (tmp_path / "one.c").write_text('#include "optpoline.h"\nDEFINE_STATIC_KEY_FALSE(trace);\n')
    (tmp_path / "two.c").write_text(
        '#include "optpoline.h"\nDEFINE_STATIC_KEY_TRUE(trace);\nint main(void) { return 0; }\n'
    )
    done = subprocess.run(
        [*LANGUAGES[language], f"-I{INCLUDE}", "one.c", "two.c", "-o", "program"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode != 0
    assert "multiple definition of `optpoline.key.trace'" in done.stderr


def instructions(path: Path) -> dict[str, Counter[str]]:
    """Count the instructions of each function by mnemonic, without padding between them."""
    listing = subprocess.run(
        ["objdump", "-d", "--no-show-raw-insn", "--no-addresses", str(path)],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    found: dict[str, Counter[str]] = {}
    for block in listing.split("\n\n"):
        head, *lines = block.strip().splitlines()
        if named := re.fullmatch(r"<(?:_Z\d+)?((?:with|plain)_[a-z]+?)(?:P.*)?>:", head):
            # Padding is nops, some with prefixes, and xchg %ax,%ax.
            code = [line for line in lines if "nop" not in line and "%ax,%ax" not in line]
            found[named[1]] = Counter(line.split()[0] for line in code)
    return found


@each_language
@pytest.mark.parametrize("level", ["-O1", "-O2", "-O3", "-Os"])
@pytest.mark.parametrize("thunk", ["keep", "thunk"])
def test_a_dynamic_call_is_the_call_it_replaces(
    language: str, level: str, thunk: str, tmp_path: Path
) -> None:
    path = tmp_path / "twins.o"
    flags = [level, f"-mindirect-branch={thunk}", "-fcf-protection=none", "-fno-ipa-icf"]
    command = [*LANGUAGES[language], "-c", *flags, f"-I{INCLUDE}", str(PROJECT / "twins.c")]
    subprocess.run([*command, "-o", str(path)], check=True)
    found = instructions(path)
    assert len(found) == 10
    for name, counts in found.items():
        if name.startswith("with_"):
            assert counts == found[name.replace("with_", "plain_")], name
