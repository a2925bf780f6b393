"""`lamina.json_schema`: JSON Schemas of results, from their types."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal, NamedTuple, NotRequired, TypedDict

import jsonschema
import pytest

import lamina
from lamina.result_schema import json_schema


class Inner(NamedTuple):
    """An inner result."""

    name: str


class Outer(NamedTuple):
    """A result with a field of
    each kind."""

    text_of: str  #: some text
    count: int
    #: Whether
    #: it is so.
    good: bool
    seconds: float
    inner: Inner
    several: tuple[Inner, ...]
    pair: tuple[int, str]
    word: Literal["a", "b"]
    either: int | str
    values: Mapping[str, int]
    anything: Mapping[str, Any]
    numbers: Sequence[int] = ()
    missing: int | None = None
    missing_inner: Inner | None = None


GIVEN = {
    "text-of": "t",
    "count": 1,
    "good": True,
    "seconds": 0.5,
    "inner": {"name": "n"},
    "several": [{"name": "n"}],
    "pair": [1, "x"],
    "word": "a",
    "either": "x",
    "values": {"x": 1},
    "anything": {"x": None},
    "numbers": [],
}


def fits(kind: Any, value: Any) -> bool:
    schema = json_schema(kind)
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema).is_valid(value)


def test_a_result_has_its_fields_with_hyphens() -> None:
    assert fits(Outer, GIVEN)
    assert fits(Outer, GIVEN | {"missing": 3, "missing-inner": {"name": "n"}})
    schema = json_schema(Outer)
    assert schema["title"] == "Outer"
    assert schema["description"] == "A result with a field of each kind."
    assert schema["required"] == list(GIVEN)
    assert schema["$defs"].keys() == {"Inner"}
    assert schema["$defs"]["Inner"]["description"] == "An inner result."


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("text-of", 1),
        ("count", True),
        ("count", 1.5),
        ("good", 0),
        ("seconds", "1"),
        ("inner", {}),
        ("inner", {"name": "n", "more": 1}),
        ("several", [{"name": 1}]),
        ("pair", [1]),
        ("pair", [1, "x", 2]),
        ("pair", ["x", 1]),
        ("word", "c"),
        ("either", None),
        ("values", {"x": "y"}),
        ("anything", []),
        ("numbers", ["x"]),
        ("missing", None),
        ("more", 1),
    ],
)
def test_other_values_do_not_fit(key: str, value: Any) -> None:
    assert not fits(Outer, GIVEN | {key: value})


def test_comments_of_fields_are_their_descriptions() -> None:
    keys = json_schema(Outer)["properties"]
    assert keys["text-of"]["description"] == "some text"
    assert keys["good"]["description"] == "Whether it is so."
    assert "description" not in keys["count"]


def test_without_the_source_there_are_no_descriptions(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> str:
        raise OSError("no source")

    monkeypatch.setattr("inspect.getsource", missing)
    assert "description" not in json_schema(Outer)["properties"]["text-of"]
    assert fits(Outer, GIVEN)


@dataclass(frozen=True)
class Frozen:
    """A frozen dataclass."""

    some_name: int
    other: str | None = None

    def to_json(self) -> dict[str, Any]:
        return {"some-name": self.some_name} | ({} if self.other is None else {"other": self.other})


def test_a_dataclass() -> None:
    assert fits(Frozen, Frozen(1).to_json())
    assert fits(Frozen, Frozen(1, "x").to_json())
    assert not fits(Frozen, {"some_name": 1})


class TreeJson(TypedDict):
    """A form that refers to itself."""

    name: Annotated[str, "its name"]
    null: int | None
    children: list[TreeJson]
    rare: NotRequired[Annotated[int, "not always there"]]
    odd: Annotated[NotRequired[int], "not always there either"]


class Tree(NamedTuple):
    """A result with a form."""

    whatever: object

    def to_json(self) -> TreeJson:
        raise NotImplementedError


class Trees(NamedTuple):
    """A result that is a list in JSON."""

    def to_json(self) -> list[TreeJson]:
        raise NotImplementedError


def test_the_annotation_of_to_json_decides() -> None:
    leaf = {"name": "leaf", "null": None, "children": []}
    top = {"name": "top", "null": 1, "children": [leaf, leaf], "rare": 1, "odd": 2}
    assert fits(Tree, top)
    assert not fits(Tree, {"name": "top", "null": 1, "children": [top, {"name": "leaf"}]})
    assert fits(Trees, [top, leaf])
    assert not fits(Trees, top)
    found = json_schema(Tree)["$defs"]["Tree"]
    assert found["description"] == "A form that refers to itself."
    assert found["properties"]["name"]["description"] == "its name"
    assert found["required"] == ["name", "null", "children"]


def test_lists_of_results_and_names() -> None:
    assert fits(list[Inner], [{"name": "n"}])
    assert json_schema("ImageInfo") == json_schema(lamina.ImageInfo)
    assert json_schema("Layer")["title"] == "Layer"


@pytest.mark.parametrize("name", ["open", "Image", "Nothing", "__version__", "LaminaError"])
def test_names_of_other_things_are_refused(name: str) -> None:
    with pytest.raises(lamina.OptionError, match=f"'{name}' is not the name of a result"):
        json_schema(name)


@pytest.mark.parametrize("kind", [bytes, complex, set[int], list[bytes], lamina.Image])
def test_types_that_json_does_not_have_are_refused(kind: Any) -> None:
    with pytest.raises(TypeError, match="JSON has nothing for"):
        json_schema(kind)


@pytest.mark.parametrize(
    "name", [name for name in lamina.__all__ if hasattr(getattr(lamina, name), "to_json") and name[0].isupper()]
)
def test_every_public_result_has_a_schema_and_cannot_be_changed(name: str) -> None:
    schema = json_schema(name)
    jsonschema.Draft202012Validator.check_schema(schema)
    kind = getattr(lamina, name)
    assert kind.to_json.__doc__
    frozen = getattr(kind, "__dataclass_params__", None)
    assert issubclass(kind, tuple) or (frozen is not None and frozen.frozen)
