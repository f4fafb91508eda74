# SPDX-License-Identifier: Apache-2.0
"""The generated program has exactly the sites asked for."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from bench.build import Variant, compile_program, variant_flags
from bench.driver import Driver
from bench.errors import BenchError
from bench.gen_sites import (
    busy_functions,
    generate_busy_sites,
    generate_hot_sites,
    generate_sites,
    hot_functions,
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("sites")
    source = directory / "sites.c"
    source.write_text(generate_sites(50))
    flags = variant_flags(Variant.RETPOLINE)
    return compile_program([source], output=directory / "sites", flags=flags)


def test_it_has_that_many_sites(program: Path) -> None:
    dump = subprocess.run(["objdump", "-d", program], capture_output=True, text=True, check=True)
    sites = re.findall(r"call +[0-9a-f]+ <__x86_indirect_thunk_\w+>", dump.stdout)
    assert len(sites) == 50


def test_it_speaks_the_protocol(program: Path) -> None:
    with Driver("sites", [str(program)]) as driver:
        assert driver.iterate() > 0
        first = driver.result
        assert driver.iterate() > 0
        assert driver.result == first


def test_a_driver_that_does_not_speak_it_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchError, match="said 'hello' instead of ready"):
        Driver("liar", ["echo", "hello"], cwd=tmp_path)


def test_a_driver_that_changes_its_mind_is_refused(tmp_path: Path) -> None:
    script = 'echo ready; n=0; while read line; do n=$((n + 1)); echo "5 $n"; done'
    with Driver("fickle", ["sh", "-c", script], cwd=tmp_path) as driver:
        assert driver.iterate() == 5
        with pytest.raises(BenchError, match="fickle computed 2, and 1 before"):
            driver.iterate()


def test_a_driver_that_ends_is_an_error(tmp_path: Path) -> None:
    with (
        Driver("short", ["sh", "-c", "echo ready; read line; exit 3"], cwd=tmp_path) as driver,
        pytest.raises(BenchError, match="short ended with status 3"),
    ):
        driver.iterate()


def test_few_of_many_run() -> None:
    source = generate_hot_sites(400, n_hot=10, n_phases=3)
    assert len(re.findall(r"^KEPT static number function_", source, re.M)) == 200
    sets = [hot_functions(400, 10, 3, phase) for phase in range(3)]
    assert len({number for numbers in sets for number in numbers}) == 30
    for phase, numbers in enumerate(sets):
        body = source[source.index(f"phase_{phase}(number x)") :].partition("return")[0]
        called = [int(number) for number in re.findall(r"function_(\d+)\(x\)", body)]
        assert {*called} == {*numbers}
        assert called.count(numbers[0]) == pytest.approx(10 * called.count(numbers[-1]), rel=0.05)


def test_too_few_functions() -> None:
    with pytest.raises(ValueError, match="too few"):
        generate_hot_sites(40, n_hot=11)


def test_all_run_and_some_often() -> None:
    source = generate_busy_sites(800, n_hot=160)
    called = [int(number) for number in re.findall(r"= function_(\d+)\(x\)", source)]
    often = set(busy_functions(800, 160))
    assert len(often) == 160
    assert {number: called.count(number) for number in range(800)} == {
        number: 10 if number in often else 1 for number in range(800)
    }


def test_the_busy_program_has_a_site_in_each_function(tmp_path: Path) -> None:
    source = tmp_path / "busy.c"
    source.write_text(generate_busy_sites(80, n_hot=8))
    flags = variant_flags(Variant.RETPOLINE)
    program = compile_program(
        [source], output=tmp_path / "busy", flags=flags, libraries=("-pthread",)
    )
    dump = subprocess.run(["objdump", "-d", program], capture_output=True, text=True, check=True)
    sites = re.findall(r"call +[0-9a-f]+ <__x86_indirect_thunk_\w+>", dump.stdout)
    assert len(sites) == 80
    with Driver("busy", [str(program)]) as driver:
        assert driver.ask("0").startswith("ok ")
