"""The page about whole images: its code runs, and its table is true."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

import lamina

PAGE = Path(__file__).resolve().parent.parent.parent / "docs" / "whole-images.md"


def test_the_code_of_the_page_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {"__name__": "page"}
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.DOTALL)
    assert len(blocks) == 6
    for block in blocks:
        exec(compile(block, str(PAGE), "exec"), names)
    said = capsys.readouterr().out
    assert "False content 0\n" in said
    assert "copy.raw was not made" in said
    assert not (tmp_path / "copy.raw").exists()


def test_the_table_names_public_functions_and_results() -> None:
    rows = re.findall(r"^\| `lamina\.(\w+)` \|.*\| `([\w.]+)`[^|]*\|$", PAGE.read_text(), re.MULTILINE)
    assert len(rows) == 15
    for function, result in rows:
        assert function in lamina.__all__
        annotation = getattr(lamina, function).__annotations__["return"]
        assert result.rpartition(".")[2] in annotation
        if "." not in result:
            assert result in lamina.__all__
            assert result in ("Range", "Extents") or callable(getattr(lamina, result).to_json)
