# SPDX-License-Identifier: Apache-2.0
"""The system's package sources, turned into private ones that list source packages."""

from __future__ import annotations

from bench.sources import private_sources

DEB822 = """\
# a comment
Types: deb deb-src
URIs: cdrom:/debian
Suites: bookworm
Components: main
Signed-By: /usr/share/keyrings/key.gpg

Types: deb
URIs: cdrom:/security
"""


def test_every_stanza_lists_source_packages_and_keeps_its_key() -> None:
    made = private_sources(DEB822, is_deb822=True)
    assert made.count("Types: deb-src\n") == 2
    assert "deb deb-src" not in made
    assert "Signed-By: /usr/share/keyrings/key.gpg" in made
    assert "comment" not in made


def test_one_line_entries() -> None:
    text = "# deb cdrom:/no x\ndeb [arch=amd64] cdrom:/a b main\ndeb-src cdrom:/a b main\n"
    assert private_sources(text, is_deb822=False) == "deb-src [arch=amd64] cdrom:/a b main\n"
