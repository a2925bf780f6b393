"""The Markdown files of the repository, and what the tests look for in them: links, headings and code blocks."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
FENCE = re.compile(r"^(?P<indent> *)```(?P<info>[^\n`]*)\n(?P<text>.*?)^(?P=indent)```[ ]*$", re.DOTALL | re.MULTILINE)
COMMENT = re.compile(r"<!--(.*?)-->", re.DOTALL)


def pages() -> list[Path]:
    """All pages: those of the site, and those at the root and beside the code."""
    folders = ("docs", "benchmarks", "examples")
    found = [*ROOT.glob("*.md"), *(page for folder in folders for page in (ROOT / folder).rglob("*.md"))]
    return sorted(found)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


class Block(NamedTuple):
    """A fenced block: its language, its title or "", its text, its first line, and the comments directly above."""

    language: str
    title: str
    text: str
    line: int
    notes: tuple[str, ...] = ()


def blocks(text: str) -> Iterator[Block]:
    """The fenced blocks of a page, and its comments `setup: ...` and `server: ...` as blocks of that name."""
    found: list[tuple[int, Block]] = []
    fences = list(FENCE.finditer(text))
    comments = [one for one in COMMENT.finditer(text) if not any(f.start() < one.start() < f.end() for f in fences)]
    for one in comments:
        word, _, body = one[1].strip().partition(":")
        if word in ("setup", "server"):
            found.append((one.start(), Block(word, "", body.strip() + "\n", _line(text, one.start()))))
    for fence in fences:
        language, _, rest = fence["info"].strip().partition(" ")
        title = re.search(r'title="([^"]*)"', rest)
        notes: list[str] = []
        before = text[: fence.start()].rstrip()
        while before.endswith("-->"):
            start = before.rindex("<!--")
            notes.append(before[start + 4 : -3].strip())
            before = before[:start].rstrip()
        body = re.sub(rf"^{fence['indent']}", "", fence["text"], flags=re.MULTILINE)
        block = Block(language, title[1] if title else "", body, _line(text, fence.start()), tuple(notes))
        found.append((fence.start(), block))
    return (block for _, block in sorted(found, key=lambda one: one[0]))


def without_code(text: str) -> str:
    """The text of a page without its blocks and comments."""
    return re.sub(r"`[^`\n]+`", "", COMMENT.sub("", FENCE.sub("", text)))


def links(text: str) -> list[str]:
    """The targets of links and pictures."""
    return re.findall(r"\]\(([^()\s]+)\)", without_code(text))


def anchors(text: str) -> set[str]:
    """The anchors of headings, as GitHub makes them."""
    found: set[str] = set()
    for heading in re.findall(r"^#{1,6} +(.*?) *$", COMMENT.sub("", FENCE.sub("", text)), re.MULTILINE):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).replace("`", "")
        slug = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        number = 0
        while (name := slug if not number else f"{slug}-{number}") in found:
            number += 1
        found.add(name)
    return found


def _line(text: str, at: int) -> int:
    return text.count("\n", 0, at) + 1
