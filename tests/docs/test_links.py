"""Links of all pages lead to files of the repository, and to headings that are there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.docs.markdown import anchors, links, name_of, pages


def broken(page: Path, text: str) -> list[str]:
    """The links in the text of a page that lead nowhere."""
    found = []
    for link in links(text):
        name, _, anchor = link.partition("#")
        if "://" in name or name.startswith("mailto:"):
            continue
        there = Path(os.path.normpath(page.parent / name)) if name else page
        if name and not there.exists():
            found.append(f"{link}: there is no such file")
        elif anchor and there.suffix == ".md" and anchor not in anchors(there.read_text() if name else text):
            found.append(f"{link}: there is no such heading")
    return found


@pytest.mark.parametrize("page", pages(), ids=name_of)
def test_links(page: Path) -> None:
    assert not broken(page, page.read_text())


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "other.md").write_text("# A `heading`, it is\n")
    text = "# Own\n[a](other.md#a-heading-it-is) [b](#own) [c](https://example.org/x)\n```text\n[d](none.md)\n```\n"
    assert not broken(tmp_path / "page.md", text)
    wrong = "[a](other.md#no) [b](#no) [c](none.md) ![d](none.svg)"
    assert len(broken(tmp_path / "page.md", wrong)) == 4
