# SPDX-License-Identifier: Apache-2.0
"""The documentation names what there is: modules, verbs, options, events, fields."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from optpoline import EventKind
from optpoline.cli.main import command_group

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
SRC = ROOT / "src" / "optpoline"
PAGES = (*ROOT.glob("*.md"), *DOCS.glob("*.md"))

# What lies in share is data: scripts that other programs run.
MODULES = {
    (path.relative_to(SRC).parts[0] if path.parent != SRC else "", path.stem)
    for path in SRC.rglob("*.py")
    if path.stem != "__init__" and path.parent.name != "share"
}


CONTEXT = click.Context(command_group)
VERBS = command_group.list_commands(CONTEXT)
PAGE_OF = {"key": "static-key", "ldflags": "cflags"}
"""Verbs that are told of on another's page."""


def listed_modules() -> Iterator[tuple[str, str]]:
    """Yield (package, module) of the table in the architecture; an empty cell goes on."""
    section = (DOCS / "architecture.md").read_text().split("## Modules")[1].split("\n## ")[0]
    package = ""
    for line in section.splitlines():
        if not line.startswith("|") or "`" not in line:
            continue
        first, _about, names = (cell.strip() for cell in line.strip("|").split("|"))
        if first:
            package = first.strip("`/") if first != "(top)" else ""
        yield from ((package, name) for name in re.findall(r"`(\w+)`", names))


def test_architecture_names_every_module_once() -> None:
    listed = list(listed_modules())
    assert sorted(listed) == sorted(MODULES)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for name, _, anchor in re.findall(r"\]\(([^)#:]*)(#([^)]*))?\)", page.read_text()):
        goal = page.parent / name if name else page
        assert goal.exists(), name
        if anchor:
            headings = re.findall(r"^#+ (.*)$", goal.read_text(), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", h.lower()).replace(" ", "-") for h in headings]
            assert anchor in slugs, f"{name}#{anchor}"


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_has_a_page_with_its_options(verb: str) -> None:
    page = (DOCS / f"{PAGE_OF.get(verb, verb)}.md").read_text()
    everywhere = (DOCS / "attach.md").read_text().split("## Options all commands share")[1]
    command = command_group.get_command(CONTEXT, verb)
    assert command is not None
    options = [text for one in command.params for text in one.opts if text.startswith("--")]
    assert [text for text in options if text not in page + everywhere] == []
    for overview in ("README.md", "CHANGELOG.md"):
        assert re.search(rf"`(optpoline )?{verb}\b", (ROOT / overview).read_text()), overview


def test_api_names_every_event() -> None:
    page = (DOCS / "api.md").read_text()
    assert [kind.name for kind in EventKind if f"`{kind.name}`" not in page] == []


@pytest.mark.parametrize(
    ("module", "pages"),
    [
        ("json_document", ("json",)),
        ("simulate_document", ("simulate", "record")),
    ],
)
def test_every_field_of_json_is_told(module: str, pages: tuple[str, ...]) -> None:
    tree = ast.parse((SRC / "report" / f"{module}.py").read_text())
    keys = {
        key.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Dict)
        for key in node.keys
        if isinstance(key, ast.Constant) and isinstance(key.value, str)
    }
    text = "".join((DOCS / f"{page}.md").read_text() for page in pages)
    assert keys
    assert [key for key in keys if not re.search(rf"[`\"]{key}[`\"]", text)] == []
