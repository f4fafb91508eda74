# SPDX-License-Identifier: Apache-2.0
"""``key`` and ``static-call``: what they ask for, show, and refuse."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from optpoline.cli.main import main
from optpoline.controller.summary import KeyState, LeftBehind
from tests.unit.cli.declared_summaries import CODEC, TRACE
from tests.unit.cli.fakes import FakeApi, FakeProgram

CHECKS = replace(TRACE, name="checks", state=KeyState.OFF, begins_on=True, count=0)


@pytest.fixture
def api() -> FakeApi:
    return FakeApi(program=FakeProgram(keys=(CHECKS, TRACE), static_calls=(CODEC,)))


def test_several_keys_are_one_transaction(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "1", "trace=on", "checks=off", "--timeout", "0.5"], api=api) == 0
    assert api.program.committed == [{"trace": "enable", "checks": "disable"}]
    assert api.program.timeout_s == 0.5
    assert api.program.is_closed
    done = capsys.readouterr()
    assert done.out == ""
    assert done.err.splitlines() == ["checks is off", "trace is on"]


def test_several_calls_are_one_transaction(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["static-call", "1", "codec=codec_v2", "hook=default"], api=api) == 0
    assert api.program.committed == [{"codec": "codec_v2", "hook": "reset"}]
    assert capsys.readouterr().err.splitlines() == ["codec calls codec_v2"]


def test_any_function_is_told_that_nobody_has_compared_types(
    api: FakeApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.program.static_calls = (CODEC, replace(CODEC, name="hook", targets=("other",)))
    assert main(["static-call", "1", "codec=other", "--any-function"], api=api) == 0
    assert api.program.committed == [{"codec": "other of any type"}]
    assert "nobody has compared" in capsys.readouterr().err
    assert main(["static-call", "1", "codec=codec_v1", "--any-function"], api=api) == 0
    assert "nobody has compared" not in capsys.readouterr().err


def test_lists(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "1"], api=api) == 0
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows == [
        ["key", "state", "begins", "count", "branches", "source"],
        ["checks", "off", "on", "0", "3", "server.c:7"],
        ["trace", "on", "off", "2", "3", "server.c:7"],
    ]
    assert main(["static-call", "1"], api=api) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[1].split() == [
        *("codec", "codec_v2", "codec_v1", "codec_v1,", "codec_v2", "4", "calls", "server.c:9")
    ]
    assert api.program.committed == []


def test_json_has_what_was_set(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["key", "1", "trace=default", "--json", "-"], api=api) == 0
    document = json.loads(capsys.readouterr().out)
    assert [key["name"] for key in document["keys"]] == ["trace"]
    assert api.program.committed == [{"trace": "reset"}]


def test_what_was_left_half_done_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    torn = replace(TRACE, state=KeyState.MIXED, is_torn=True)
    api = FakeApi(program=FakeProgram(keys=(torn,)))
    assert main(["key", "1"], api=api) == 0
    assert "trace was left half changed" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "status", "said"),
    [
        (("key", "1", "trace"), 2, "'trace' is not NAME=on|off|default"),
        (("key", "1", "=on"), 2, "'=on' is not NAME=on|off|default"),
        (("key", "1", "trace=maybe"), 2, "maybe is no state of the static key trace"),
        (("key", "1", "trace=on", "trace=off"), 2, "trace is set twice"),
        (("key", "1", "nothing=on"), 2, "no static key nothing"),
        (("static-call", "1", "codec="), 2, "'codec=' is not NAME=FUNCTION"),
        (("key", "0", "trace=on"), 2, "not a process id"),
    ],
)
def test_wrong_words_change_nothing(
    api: FakeApi,
    words: tuple[str, ...],
    status: int,
    said: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(list(words), api=api) == status
    assert said in capsys.readouterr().err
    assert api.program.committed == []


@pytest.mark.parametrize("verb", ["key", "static-call"])
def test_program_that_declares_nothing(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "1"], api=FakeApi()) == 3
    err = capsys.readouterr().err
    assert "declares no static" in err
    assert "of optpoline.h declares one; -DOPTPOLINE_DISABLE" in err


LEFT = LeftBehind(
    pid=1,
    controller_pid=0,
    controller_alive=False,
    arenas=0,
    sites=0,
    baseline=0,
    foreign=0,
    site_addresses=(),
    settings=("trace=on",),
)


def test_detach_keeps_settings_unless_told(api: FakeApi) -> None:
    api.left = LEFT
    assert main(["detach", "1"], api=api) == 0
    assert not api.restored_settings
    assert main(["detach", "1", "--settings"], api=api) == 0
    assert api.restored_settings


def test_status_tells_settings(api: FakeApi, capsys: pytest.CaptureFixture[str]) -> None:
    api.left = LEFT
    assert main(["status", "1"], api=api) == 0
    out = capsys.readouterr().out
    assert out.splitlines() == ["process 1: no site is promoted", "  set: trace=on"]
    api.left = replace(LEFT, arenas=1, controller_pid=9, sites=3)
    assert main(["status", "1"], api=api) == 0
    assert "3 sites promoted by controller 9" in (out := capsys.readouterr().out)
    assert "  set: trace=on" in out
