"""docs/qcow2.md is generated from the code."""

from __future__ import annotations

import importlib.util
from pathlib import Path

DOCS = Path(__file__).resolve().parent.parent.parent / "docs"


def test_the_page_is_generated_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("qcow2_format", DOCS / "qcow2_format.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (DOCS / "qcow2.md").read_text() == module.page(), "run make docs"
