"""The site builds without a warning; every link inside it leads somewhere, and its pages load nothing from elsewhere."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from tests.conftest import missing
from tests.docs.markdown import ROOT


def build(root: Path, to: Path) -> subprocess.CompletedProcess[str]:
    """Build the site of the repository at `root`. (With `--quiet`, `--strict` would see no warnings.)"""
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", to, "-f", root / "mkdocs.yml"]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    return subprocess.run(command, cwd=root, capture_output=True, text=True, check=False, env=environment)


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    try:
        import material  # noqa: F401 - its presence
    except ImportError:
        missing("mkdocs-material", "install Lamina with the extra docs")
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    return folder


class Page(HTMLParser):
    """What a page of the site refers to: `links` that a reader may follow, `loads` that a browser fetches, and its `ids`."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.links: list[str] = []
        self.loads: list[str] = []
        self.ids: set[str] = set()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids.update(values[name] for name in ("id", "name") if name in values)
        if tag == "a":
            self.links.append(values.get("href", ""))
        elif tag == "link":
            # These are names, not files to load.
            if values.get("rel") not in ("canonical", "next", "prev"):
                self.loads.append(values.get("href", ""))
        elif "src" in values:
            self.loads.append(values["src"])


def test_links_of_the_site(site: Path) -> None:
    pages = {path: Page(path.read_text(encoding="utf-8")) for path in site.rglob("*.html")}
    assert len(pages) > 60
    wrong = []
    for path, page in pages.items():
        if path.name == "404.html":  # its links begin with a slash: it may be shown at any address
            continue
        for link in page.links:
            parts = urlsplit(link)
            if parts.scheme or parts.netloc:
                continue
            there = Path(os.path.normpath(path.parent / unquote(parts.path))) if parts.path else path
            there = there / "index.html" if there.is_dir() else there
            if not there.exists() or (
                parts.fragment and there in pages and unquote(parts.fragment) not in pages[there].ids
            ):
                wrong.append(f"{path.relative_to(site)}: {link}")
    assert not wrong


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for path in site.rglob("*.html"):
        for name in Page(path.read_text(encoding="utf-8")).loads:
            assert not re.match(r"(\w+:)?//", name), f"{path.relative_to(site)} loads {name}"
    for path in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(\w+:)?//", path.read_text(encoding="utf-8")), path


def test_a_broken_link_ends_the_build(site: Path, tmp_path: Path) -> None:
    for name in ("docs", "mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md", "benchmarks"):
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tmp_path / name, ignore=shutil.ignore_patterns("__pycache__"))
        elif source.exists():
            shutil.copy(source, tmp_path / name)
    public = Path("tests", "architecture", "test_public_names.py")
    (tmp_path / public).parent.mkdir(parents=True)
    shutil.copy(ROOT / public, tmp_path / public)
    (tmp_path / "docs" / "index.md").write_text("# Lamina\n\n[there](safety.md#no-such-heading)\n")
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0
    assert "no-such-heading" in done.stderr
