"""The contract of a format: what a driver does not override is refused by name, and every format keeps the contract."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import lamina
from lamina import Budget, OptionError, UnsupportedFeature, registry
from lamina.creation import create_driver
from lamina.format import Format, lookup_format
from lamina.job_results import MeasureResult
from lamina.node import FilterNode
from lamina.request import Child
from lamina.schema import Option, Schema
from lamina.storage.memory import MemoryStorage


class Bare(Format):
    """A format of which nothing is written but that it is one."""

    driver = "bare"
    schema = Schema("bare", [Option("file", "node", "the storage", required=True)])

    @property
    def size(self) -> int:
        return 0

    @property
    def filename(self) -> str:
        return "disk.bare"


class NoFormat(FilterNode):
    driver = "no-format"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    entries, aliases = dict(registry._entries), dict(registry._aliases)
    registry.register("bare", "format", f"{__name__}:Bare", "a format that can do nothing")
    registry.register("no-format", "format", f"{__name__}:NoFormat", "a filter that says that it is a format")
    yield
    registry._entries.clear()
    registry._entries.update(entries)
    registry._aliases.clear()
    registry._aliases.update(aliases)


#: What each operation of the contract is called with, and a word of its refusal. A new operation needs a row.
OPERATIONS: dict[str, tuple[tuple[Any, ...], str]] = {
    "creation_schema": ((), "creation of images"),
    "create": ((None, 0, {}), "creation of images"),
    "file_of": ((None, {}), "one pass"),
    "measure": ((0, {}), "measurement"),
    "inspect": ((None, {}), "header"),
    "explain": ((None, {}), "explain"),
    "check": ((), "nothing to check"),
    "repair": (("leaks",), "repaired"),
    "resize": ((512, "full"), "change of the size"),
    "make_empty": ((), "emptied"),
    "amend": (({},), "changed later"),
    "require_amendable": (({},), "changed later"),
    "free_zeros": ((0, 512), "zeros"),
    "trim": ((), "free space"),
    "snapshots": ((), "snapshots"),
    "create_snapshot": (("one",), "snapshots"),
    "read_vm_state": ((0, 1), "snapshots"),
    "apply_snapshot": (("1",), "snapshots"),
    "delete_snapshot": (("1",), "snapshots"),
    "add_bitmap": (("b", 65536), "bitmaps"),
    "remove_bitmap": (("b",), "bitmaps"),
    "clear_bitmap": (("b",), "bitmaps"),
    "enable_bitmap": (("b", True), "bitmaps"),
    "merge_bitmaps": (("b", ()), "bitmaps"),
}
#: What is no operation of an image: a helper, and steps that there need not be.
OTHERS = {"refusal", "pack", "prepare_create", "side_files", "options_to_open", "close"}


def declared() -> set[str]:
    return {
        name
        for name, value in vars(Format).items()
        if not name.startswith("_") and (inspect.isfunction(value) or isinstance(value, classmethod))
    }


def test_every_operation_has_a_row() -> None:
    assert declared() == set(OPERATIONS) | OTHERS


@pytest.mark.parametrize("name", OPERATIONS)
def test_what_is_not_overridden_is_refused_by_name(name: str) -> None:
    arguments, words = OPERATIONS[name]
    node = Bare()
    with pytest.raises(UnsupportedFeature, match=words) as caught:
        getattr(node, name)(*arguments)
    assert "the format bare" in caught.value.message
    bound = not isinstance(vars(Format)[name], classmethod)
    assert caught.value.path == ("disk.bare" if bound else None)
    assert dict(node.bitmaps) == {}


def test_what_is_no_operation_is_no_refusal() -> None:
    values = {"size": 1}
    Bare.prepare_create(values, "target", Budget())
    assert values == {"size": 1}


def test_every_format_of_lamina_keeps_the_contract() -> None:
    for name in registry.names("format"):
        kind = lookup_format(name)
        assert issubclass(kind, Format)
        assert create_driver(name) is kind
        assert kind.creation_schema()["size"].type == "size"


@pytest.mark.usefixtures("bare")
def test_a_format_without_new_images_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedFeature, match="bare does not support the creation of images"):
        lamina.create(tmp_path / "new", "bare", 512)
    assert not list(tmp_path.iterdir())


@pytest.mark.usefixtures("bare")
def test_a_driver_of_another_contract_is_refused_by_name() -> None:
    with pytest.raises(OptionError, match="no-format does not derive from"):
        lookup_format("no-format")
    with pytest.raises(OptionError, match="a format is needed"):
        create_driver("memory")


def test_raw_describes_its_window() -> None:
    storage = Child(MemoryStorage(10_000), "file")
    kind = lookup_format("raw")
    assert kind.inspect(storage, {}).virtual_size == 10_000
    assert kind.inspect(storage, {"offset": 512}).virtual_size == 9488
    assert kind.inspect(storage, {"offset": 512, "size": 100}).virtual_size == 100
    with pytest.raises(OptionError, match="past the end"):
        kind.inspect(storage, {"offset": 10_001})


def test_a_measure_has_the_names_of_the_peers() -> None:
    assert MeasureResult(1, 2).to_json() == {"required": 1, "fully-allocated": 2}
