# SPDX-License-Identifier: Apache-2.0
"""Text keeps to its width, and the target cannot steer the terminal."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from optpoline.controller.summary import (
    BranchSource,
    DetachOutcome,
    DetachResult,
    ModuleSummary,
    ReclaimSummary,
    SessionState,
)
from optpoline.process.checks import Check, CheckStatus, Failure
from optpoline.report.check_text import format_checks
from optpoline.report.demangle import readable_name, shorten_middle
from optpoline.report.session_text import format_detach, format_progress, format_summary
from optpoline.report.sites_text import format_no_sites, format_sites
from optpoline.report.table import Colour, Column, Style, format_table, printable
from tests.unit.cli.fakes import make_site, make_summary

PLAIN = Style()
LONG_CPP = (
    "_ZNSt6vectorINSt7__cxx1112basic_stringIcSt11char_traitsIcESaIcEEESaIS5_EE"
    "17_M_realloc_insertIJRKS5_EEEvN9__gnu_cxx17__normal_iteratorIPS5_S7_EEDpOT_+0x4b"
)


@given(st.text(max_size=60), st.integers(min_value=1, max_value=60))
def test_cutting_keeps_the_width_and_both_ends(text: str, width: int) -> None:
    cut = shorten_middle(text, width)
    assert len(cut) == min(len(text), width)
    if len(text) <= width:
        assert cut == text
    elif width >= 3:
        assert cut[0] == text[0]
        assert cut[-1] == text[-1]


@pytest.mark.parametrize(
    ("name", "readable"),
    [
        ("luaV_execute", "luaV_execute"),
        ("_ZN4Base3runEi", "Base::run(int)"),
        ("_ZN4Base3runEi+0x8", "Base::run(int)+0x8"),
        ("_Znot_mangled", "_Znot_mangled"),
        ("_Z", "_Z"),
        ("", ""),
    ],
)
def test_demangling(name: str, readable: str) -> None:
    assert readable_name(name) == readable


@given(st.text())
def test_printable_holds_no_control_character(text: str) -> None:
    shown = printable(text)
    assert len(shown) == len(text)
    assert shown.isprintable()


@given(st.lists(st.tuples(st.text(max_size=200), st.text(max_size=200)), max_size=5))
def test_tables_keep_to_the_width(rows: list[tuple[str, str]]) -> None:
    columns = (Column(title="one", flexible=True), Column(title="two", right=True, flexible=True))
    lines = format_table(columns, rows, Style(width=40))
    assert len(lines) == len(rows) + 1
    assert max(len(line) for line in lines) <= 40


def test_table_that_fits_is_not_cut() -> None:
    columns = (Column(title="n", right=True), Column(title="name", flexible=True))
    lines = format_table(columns, [("1", "a"), ("20", "a long name")], Style(width=15))
    assert lines == [" n  name", " 1  a", "20  a long name"]


def test_colours_only_where_asked() -> None:
    assert Style().paint("x", Colour.RED) == "x"
    assert Style(colour=True).paint("x", Colour.RED) == "\x1b[31mx\x1b[0m"


def test_summary_fits_80_columns() -> None:
    summary = make_summary()
    sites = tuple(make_site(0x7F0000001000 + 16 * i, function=LONG_CPP) for i in range(12))
    lines = format_summary(replace(summary, sites=sites, notes=("one", "two\x1b[2J")), PLAIN)
    assert max(len(line) for line in lines) <= 80
    text = "\n".join(lines)
    assert "void std" in text
    assert "and 2 more that branched" in text
    assert "note: two?[2J" in text


def test_summary_says_how_many_sites_have_their_tables_branches() -> None:
    summary, words = make_summary(), "promoted by what other sites of the same table called"
    assert not any(words in line for line in format_summary(summary, PLAIN))
    sites = [replace(site, table="t", source=BranchSource.TABLE) for site in summary.sites[:1]]
    lines = format_summary(replace(summary, sites=(*sites, *summary.sites[1:])), PLAIN)
    assert f"  1 site {words}" in lines


def test_sites_name_their_tables() -> None:
    (module,) = make_summary().modules
    sites = (make_site(), replace(make_site(0x401150), table="handlers"))
    _, head, *rows = format_sites((module,), sites, PLAIN)
    assert head.split()[-1] == "table"
    assert [row.split()[-1] for row in rows] == ["-", "handlers"]
    _, head, *_ = format_sites((module,), sites[:1], PLAIN)
    assert "table" not in head.split()


def test_summary_names_why_sites_were_left_out() -> None:
    assert "  1 site left out: it is odd" in format_summary(make_summary(), PLAIN)


def test_summary_of_a_session_that_sampled_nothing() -> None:
    summary = replace(make_summary(), sites=(), promoted=0, hit_rate=None)
    text = "\n".join(format_summary(replace(summary, state=SessionState.EXITED), PLAIN))
    assert text.startswith("the program exited\n  0 of 0 sites promoted, hit rate -")
    assert "branches/s" not in text


RECLAIM = ReclaimSummary(
    blocks_retired=12,
    blocks_reclaimed=10,
    blocks_reused=4,
    grace_periods=1,
    bytes_poisoned=9000,
)


@pytest.mark.parametrize(
    ("reclaim", "verbose", "expected"),
    [
        (ReclaimSummary(), True, []),
        (ReclaimSummary(holders=(7,), is_search_refused=True), True, []),
        (RECLAIM, False, []),
        (
            RECLAIM,
            True,
            ["  12 blocks replaced, 10 reclaimed in 1 grace period, 4 written in their place"],
        ),
        (
            replace(RECLAIM, holders=(7, 8)),
            False,
            ["  2 replaced blocks kept: threads 7 and 8 may be inside"],
        ),
        (
            replace(RECLAIM, blocks_reclaimed=11, holders=tuple(range(4_000_000, 4_002_000))),
            False,
            [
                "  1 replaced block kept: threads 4000000, 4000001, 4000002, 4000003 and 1996 more"
                " may be inside"
            ],
        ),
        (
            replace(RECLAIM, blocks_reclaimed=0, holders=(7,), is_search_refused=True),
            False,
            [
                "  12 replaced blocks kept: the program's memory cannot be searched for contexts"
                " in them"
            ],
        ),
    ],
)
def test_summary_says_what_became_of_replaced_blocks(
    reclaim: ReclaimSummary, verbose: bool, expected: list[str]
) -> None:
    without = format_summary(make_summary(), PLAIN)
    lines = format_summary(replace(make_summary(), reclaim=reclaim), PLAIN, verbose=verbose)
    assert [line for line in lines if line not in without] == expected


@pytest.mark.parametrize("state", SessionState)
def test_every_state_has_words(state: SessionState) -> None:
    assert format_summary(replace(make_summary(), state=state), PLAIN)[0]


@pytest.mark.parametrize("outcome", DetachOutcome)
def test_every_outcome_has_words(outcome: DetachOutcome) -> None:
    result = DetachResult(outcome=outcome, restored=2, foreign=(1,), notes=("why",))
    lines = format_detach(result)
    assert lines[-1] == "note: why"
    assert len(lines) == 2


def test_progress_line() -> None:
    line = format_progress(make_summary(), 12.3)
    assert line == "12 s · watching · 2 sites · 1 promoted · hits 99.3% · stopped 0.9 ms"


def test_sites_are_grouped_by_module() -> None:
    one = ModuleSummary(path="/usr/bin/lua", n_sites=2, n_refused=1, n_thunks=3, n_plain=None)
    two = replace(one, path="/usr/lib/none.so", n_sites=0)
    sites = (make_site(0x401150, refusal="its displacement crosses a page"), make_site())
    lines = format_sites((two, one), sites, PLAIN)
    assert lines[0] == "/usr/bin/lua: 2 sites, 3 thunks, 1 not promotable"
    assert lines[2].startswith("0x401136  call")
    assert "no: its" in lines[3]
    assert max(len(line) for line in lines) <= 80


@pytest.mark.parametrize(
    ("n_plain", "words"),
    [
        (None, "3 thunks in its modules"),
        (0, "3 thunks in its modules, no indirect branch at all"),
        (1, "3 thunks in its modules, 1 plain indirect branch"),
        (5, "3 thunks in its modules, 5 plain indirect branches"),
    ],
)
def test_what_there_is_instead_of_sites(n_plain: int | None, words: str) -> None:
    module = ModuleSummary(path="x", n_sites=0, n_refused=0, n_thunks=3, n_plain=n_plain)
    assert format_no_sites((module,)) == words


def test_a_file_has_no_modules() -> None:
    module = ModuleSummary(path="x", n_sites=0, n_refused=0, n_thunks=1, n_plain=0)
    words = "1 thunk in it, no indirect branch at all"
    assert format_no_sites((module,), is_file=True) == words


def test_inline_retpolines_are_not_called_plain() -> None:
    module = ModuleSummary(path="x", n_sites=0, n_refused=0, n_thunks=0, n_plain=7, n_inline=3)
    words = "0 thunks in its modules, 3 inline retpolines"
    assert format_no_sites((module,)) == words
    assert format_no_sites((replace(module, n_plain=0),)) == words


def test_paths_in_checks_are_not_cut() -> None:
    path = "/" + "x" * 90
    check = Check(name="gdb script", status=CheckStatus.OK, sentence=f"it is here: {path}")
    assert any(line.strip() == path for line in format_checks("title", (check,), PLAIN))


def test_checks_are_wrapped_and_advice_is_shown() -> None:
    checks = (
        Check(name="kind", status=CheckStatus.OK, sentence="word " * 40, advice="not shown"),
        Check(
            name="owner",
            status=CheckStatus.FAIL,
            sentence="bad",
            advice="do something about it",
            failure=Failure.PERMISSION,
        ),
    )
    lines = format_checks("title", checks, PLAIN)
    assert max(len(line) for line in lines) <= 80
    assert "  fail owner  bad" in lines
    assert lines[-1].strip() == "-> do something about it"
    assert "not shown" not in "\n".join(lines)
    coloured = format_checks("title", checks, Style(colour=True))
    assert "  \x1b[31mfail\x1b[0m owner  bad" in coloured
