"""The pages of the API have every public name, with its docstring."""

from __future__ import annotations

import importlib.util
from typing import Any

import pytest

import lamina
from tests.architecture.test_public_names import FOR_DRIVERS, FOR_PROGRAMS
from tests.docs.markdown import ROOT


@pytest.fixture(scope="module")
def made() -> dict[str, str]:
    spec = importlib.util.spec_from_file_location("api_pages", ROOT / "docs" / "api_pages.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return dict(module.pages())


def test_every_public_name_is_on_a_page(made: dict[str, str]) -> None:
    everything = "\n".join(made.values())
    for module, names in (FOR_PROGRAMS | FOR_DRIVERS).items():
        if names == "*":
            continue
        for name in set(names.split()) - {"__version__"}:
            anchor = f"lamina.{module}.{name}" if module else f"lamina.{name}"
            assert f"## {name} {{ #{anchor} }}" in everything, anchor
            assert f"#{anchor})" in made["api/index.md"], anchor


def test_docstrings_and_signatures_are_shown(made: dict[str, str]) -> None:
    page = made["api/functions.md"]
    assert "open(\n    source: str" in page
    assert "Images are opened read-only by default" in page
    assert (lamina.Extents.align.__doc__ or "").splitlines()[0] in made["api/extents.md"]
    assert "<function" not in "".join(made.values())
