"""`lamina drivers`, and the word `help` among options: all that is printed comes from the schemas, and nothing is opened."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from lamina import registry
from lamina.cli.main import COMMANDS, main
from lamina.format import lookup_format
from lamina.graph import COMMON
from lamina.schema import Option, Schema


def printed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    capsys.readouterr()
    assert main(list(words)) == 0
    return capsys.readouterr().out


def test_every_driver_is_listed_once(capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "drivers")
    listed = json.loads(printed(capsys, "drivers", "--output=json"))
    assert [one["name"] for one in listed] == list(registry.names())
    for one in listed:
        found = registry.entry(one["name"])
        assert one == {
            "name": found.name,
            "kind": found.kind,
            "summary": found.summary,
            "aliases": list(found.aliases),
        }
        rows = [line for line in told.splitlines() if line.split()[:1] == [found.name] and found.summary in line]
        assert len(rows) == 1


@pytest.mark.parametrize("name", registry.names())
def test_every_option_of_every_driver_is_told(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    told = printed(capsys, "drivers", name)
    found = json.loads(printed(capsys, "drivers", "--output=json", name))
    groups = {"options": registry.lookup(name).schema}
    if registry.entry(name).kind == "format":
        kind = lookup_format(name)
        groups |= {"create-options": kind.create_schema, "amend-options": kind.amend_schema}
    for key, schema in groups.items():
        if schema is None:
            assert key not in found
            continue
        _same(found[key], schema)
        for row in schema.help():
            lines = [line for line in told.splitlines() if line.startswith(f"  {row[0]}=")]
            assert any(row[3] in line for line in lines)
    assert [one["name"] for one in found["common-options"]] == list(COMMON)


def _same(found: list[dict[str, Any]], schema: Schema) -> None:
    assert [one["name"] for one in found] == [option.name for option in schema.options]
    for one, option in zip(found, schema.options, strict=True):
        assert (one["type"], one["doc"], one["required"]) == (option.type, option.doc, option.required)
        assert one.get("default") == (list(option.default) if isinstance(option.default, tuple) else option.default)
        assert (one.get("minimum"), one.get("maximum")) == (option.minimum, option.maximum)
        assert tuple(one.get("choices", ())) == option.choices
        if isinstance(option.items, Schema):
            _same(one["items"], option.items)
        elif isinstance(option.items, Option):
            assert one["items"]["type"] == option.items.type


def test_an_alias_names_its_driver(capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, "drivers", "null-co") == printed(capsys, "drivers", "null")


def test_an_unknown_name_is_refused_with_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["drivers", "qcow3"]) == 1
    assert "did you mean qcow2" in capsys.readouterr().err
    assert main(["drivers", "vmdk"]) == 1
    assert "has no driver" in capsys.readouterr().err


_OPENING = {
    "info": ["info"],
    "map": ["map"],
    "check": ["check"],
    "compare": ["compare", "{}", "other"],
    "convert": ["convert", "{}", "-O", "raw", "target"],
    "resize": ["resize", "{}", "1M"],
    "io": ["io"],
}


@pytest.mark.parametrize("command", list(_OPENING))
def test_help_among_the_options_of_an_image(
    command: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert command in COMMANDS
    for text in ("driver=throttle,help", "help,driver=throttle", "driver=throttle,image.driver=raw,?"):
        first, *rest = _OPENING[command]
        words = [text if word == "{}" else word for word in rest] or [text]
        assert printed(capsys, first, "--image-opts", *words) == printed(capsys, "drivers", "throttle")
    assert list(tmp_path.iterdir()) == []


def test_help_without_a_driver_says_what_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["info", "--image-opts", "help"]) == 1
    assert "driver=NAME,help" in capsys.readouterr().err


def test_drivers_of_installed_packages_are_listed_without_an_import(tmp_path: Path) -> None:
    info = tmp_path / "example-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: example\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(
        "[lamina.drivers]\nfilter.sluggish = example_that_ends:Slow\nfilter.throttle = example_that_ends:Taken\n"
    )
    (tmp_path / "example_that_ends.py").write_text("raise SystemExit(7)\n")
    lines = (
        "import sys; sys.path.append(sys.argv.pop()); from lamina.cli.main import main; sys.exit(main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", lines, "drivers", "--output=json", str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
    )
    found = {one["name"]: one for one in json.loads(done.stdout)}
    assert found["sluggish"]["kind"] == "filter"
    assert found["throttle"]["summary"] == registry.entry("throttle").summary
