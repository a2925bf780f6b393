"""The Python blocks of docs/asyncio.md and docs/fsspec.md run from top to bottom, print what they show, and type-check."""

from __future__ import annotations

import builtins
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from ..conftest import in_ci

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "docs" / "asyncio.md", ROOT / "docs" / "fsspec.md"]
FENCE = re.compile(r"(?P<note><!-- not run:[^\n]*-->\n)?^```python\n(?P<text>.*?)^```$", re.DOTALL | re.MULTILINE)
PRINT = re.compile(r"^\s*print\(.*\)  # (.*)$")


def module(page: Path, *, whole: bool) -> str:
    """The blocks of a page as one module, whose lines are those of the page. `whole`: with those that are not run."""
    source, text = page.read_text(), ""
    for block in FENCE.finditer(source):
        if whole or not block["note"]:
            line = source.count("\n", 0, block.start("text"))
            text += "\n" * (line - text.count("\n")) + block["text"]
    return text


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_the_blocks_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if page.name == "fsspec.md":
        if not in_ci():
            pytest.importorskip("fsspec")
        import fsspec

        fsspec.register_implementation("lamina", "lamina.fsspec.ImageFileSystem", clobber=True)
    monkeypatch.chdir(tmp_path)
    told: dict[int, str] = {}

    def tell(*values: Any, **_: Any) -> None:
        told[sys._getframe(1).f_lineno] = " ".join(map(str, values))

    text = module(page, whole=False)
    exec(compile(text, page, "exec", dont_inherit=True), {"__name__": "__main__", "print": tell})
    shown = {number: found[1] for number, line in enumerate(text.splitlines(), 1) if (found := PRINT.match(line))}
    assert len(shown) >= 4
    assert {number: told.get(number) for number in shown} == shown
    assert builtins.print is not tell


def test_the_blocks_type_check(tmp_path: Path) -> None:
    for page in PAGES:
        (tmp_path / f"page_{page.stem}.py").write_text(module(page, whole=True))
    command = [sys.executable, "-m", "mypy", "--strict", "--config-file", str(ROOT / "pyproject.toml")]
    command += ["--cache-dir", str(ROOT / ".mypy_cache"), *(f"page_{page.stem}.py" for page in PAGES)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
