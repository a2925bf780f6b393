"""The parts of pages that are made from the code are current; every command, driver and option has its page."""

from __future__ import annotations

import importlib.util
import tomllib
from pathlib import Path
from typing import Any

import pytest

from lamina import registry
from lamina.cli.main import COMMANDS
from tests.docs.markdown import ROOT, name_of


def generator(name: str) -> Any:
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


GENERATOR = generator("generated_parts")


@pytest.mark.parametrize("page", list(GENERATOR.pages()), ids=name_of)
def test_generated_parts_are_current(page: Path) -> None:
    text = page.read_text()
    assert text == GENERATOR.filled(text), "run make docs"
    assert text.count("<!-- generated:") == text.count("<!-- end -->")


def test_the_picture_of_block_status_is_current() -> None:
    pictures = generator("status_pictures")
    assert pictures.PICTURE.read_text() == pictures.picture(), "run make docs"


def test_a_change_of_the_code_is_noticed() -> None:
    text = "<!-- generated: driver offset -->\n<!-- end -->\n"
    filled = GENERATOR.filled(text)
    assert "| `offset` | a size | `0` |" in filled
    assert GENERATOR.filled(filled) == filled
    assert GENERATOR.filled(filled.replace("a size", "text")) == filled


@pytest.mark.parametrize("command", COMMANDS)
def test_each_command_has_a_page(command: str) -> None:
    page = (ROOT / "docs" / "commands" / f"{command}.md").read_text()
    assert page.startswith(f"# lamina {command}\n")
    assert f"<!-- generated: command {command} -->" in page
    assert "```console" in page or "```sh" in page


@pytest.mark.parametrize("driver", [name for name in registry.names() if registry.entry(name).kind != "format"])
def test_each_storage_and_filter_has_a_page(driver: str) -> None:
    folder = {"storage": "storage", "filter": "filters"}[registry.entry(driver).kind]
    page = (ROOT / "docs" / folder / f"{driver}.md").read_text()
    assert page.startswith(f"# {driver}\n")
    assert f"<!-- generated: driver {driver} -->" in page


@pytest.mark.parametrize("name", registry.names("format"))
def test_each_format_has_a_page(name: str) -> None:
    page = (ROOT / "docs" / "formats" / f"{name}.md").read_text()
    assert page.startswith(f"# {name}\n")
    assert f"<!-- generated: driver {name} -->" in page


def test_each_extra_is_explained() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    page = (ROOT / "docs" / "install.md").read_text()
    for name in extras:
        assert f"| `{name}` |" in page
