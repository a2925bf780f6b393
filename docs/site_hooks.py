"""What mkdocs does while it builds the site (`hooks` of mkdocs.yml): pages from the docstrings and from the files at the
root of the repository, and links that lead out of this folder."""

from __future__ import annotations

import posixpath
import re
import sys
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent

#: Files of the repository that are pages of the site.
ROOT_PAGES = {
    "CONTRIBUTING.md": "contributing.md",
    "CHANGELOG.md": "changelog.md",
    "SECURITY.md": "security.md",
    "benchmarks/README.md": "benchmarks.md",
}
_LINK = re.compile(r"(?<!!)\[((?:[^\[\]]|\[[^\]]*\])*)\]\(([^()\s#]*)(#[^()\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that have no file in this folder."""
    sys.path.insert(0, str(Path(__file__).parent))
    try:
        import api_pages
    finally:
        sys.path.pop(0)
    for path, text in api_pages.pages():
        if path == api_pages.INDEX:
            text = (ROOT / "docs" / path).read_text(encoding="utf-8") + "\n" + text
            files.remove(next(file for file in files if file.src_uri == path))
        files.append(File.generated(config, path, content=text))
    for name, path in ROOT_PAGES.items():
        if (ROOT / name).is_file():
            files.append(File.generated(config, path, content=(ROOT / name).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Links out of the folder lead to the page that shows the file, or are plain text."""
    uri: str = page.file.src_uri
    source = next((name for name, path in ROOT_PAGES.items() if path == uri), f"docs/{uri}")
    folder = posixpath.dirname(source)

    def lead(found: re.Match[str]) -> str:
        text, target, anchor = found[1], found[2], found[3] or ""
        if not target or "://" in target or target.startswith("mailto:"):
            return found[0]
        path = posixpath.normpath(posixpath.join(folder, target))
        if path.startswith("docs/"):
            there = path.removeprefix("docs/")
        elif path in ROOT_PAGES:
            there = ROOT_PAGES[path]
        elif path == "README.md":
            there = "index.md"
        elif (ROOT / path).exists():
            return f"{text}" if text.startswith("`") else f"{text} (`{path}`)"
        else:
            return found[0]  # mkdocs tells that there is no such page
        return f"[{text}]({posixpath.relpath(there, posixpath.dirname(uri) or '.')}{anchor})"

    parts = re.split(r"(^```.*?^```[^\n]*$)", markdown, flags=re.DOTALL | re.MULTILINE)
    return "".join(part if part.startswith("```") else _LINK.sub(lead, part) for part in parts)
