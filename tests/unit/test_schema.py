"""Schemas: the typed values of a driver's options, and what is said about one that is wrong."""

from __future__ import annotations

import json
from collections import UserDict
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import OptionError
from lamina.schema import Option, Schema

RULE = Schema(
    "inject-error", [Option("event", "str", "when", required=True), Option("errno", "int", "which", default=5)]
)
CACHE = Schema("cache", [Option("direct", "bool", "go around the cache", default=False)])
TOY = Schema(
    "toy",
    [
        Option("file", "node", "the storage", required=True),
        Option("backing", "node", "the layer below"),
        Option("cluster_size", "size", "unit", default=65536, minimum=512, maximum=2 << 20, aliases=("cluster-size",)),
        Option("preallocation", "enum", "what is allocated", default="off", choices=("off", "metadata", "full")),
        Option("refcount_bits", "int", "width", default=16, choices=(1, 2, 4, 8, 16, 32, 64)),
        Option("level", "int", "effort", minimum=-1, maximum=9),
        Option("lazy", "bool", "later", default=True),
        Option("label", "str", "a text"),
        Option("inject-error", "list", "rules", items=RULE),
        Option("children", "list", "copies", items=Option("child", "node", "one copy")),
        Option("cache", "dict", "how to cache", items=CACHE),
        Option("extra", "any", "whatever"),
    ],
)


def toy(**options: Any) -> dict[str, Any]:
    return TOY.parse({"file": "x", **options})


def test_defaults_complete_the_result() -> None:
    assert TOY.parse({"file": "x"}) == {
        "file": "x",
        "cluster_size": 65536,
        "preallocation": "off",
        "refcount_bits": 16,
        "level": None,
        "lazy": True,
        "label": None,
        "inject-error": [],
        "children": [],
        "cache": None,
        "extra": None,
    }
    assert toy()["children"] is not toy()["children"]
    defaults = Schema("x", [Option("l", "list", "", default=(1, 2), items=Option("i", "int", ""))])
    assert defaults.parse({})["l"] == [1, 2]


@pytest.mark.parametrize(
    ("key", "value", "parsed"),
    [
        ("cluster_size", "64k", 65536),
        ("cluster_size", "0x200", 512),
        ("cluster_size", 512, 512),
        ("cluster_size", 2 << 20, 2 << 20),
        ("cluster_size", None, 65536),
        ("preallocation", "full", "full"),
        ("refcount_bits", "64", 64),
        ("refcount_bits", 1, 1),
        ("level", "-1", -1),
        ("level", "+0x9", 9),
        ("level", "0", 0),
        ("level", 9, 9),
        ("lazy", False, False),
        ("label", "", ""),
        ("label", "123", "123"),
        ("label", Path("a/b"), "a/b"),
        ("extra", {"a": [1]}, {"a": [1]}),
        ("extra", None, None),
        ("backing", None, None),
        ("backing", "", None),
        ("backing", "base", "base"),  # checked, and left to the graph, which knows what a bare name means there
        ("backing", Path("foo:bar"), {"filename": "foo:bar"}),
        ("backing", "blkdebug::x", "blkdebug::x"),
        ("backing", {"driver": "raw", "file": {"filename": "x"}}, {"driver": "raw", "file": {"filename": "x"}}),
        ("backing", UserDict({"driver": "null"}), {"driver": "null"}),
        ("backing", {}, {}),
        ("inject-error", [{"event": "x", "errno": "0x1c"}], [{"event": "x", "errno": 28}]),
        ("inject-error", ({"event": "x"},), [{"event": "x", "errno": 5}]),
        ("children", ["a", {"driver": "null"}], ["a", {"driver": "null"}]),
        ("cache", {"direct": "on"}, {"direct": True}),
        ("cache", {}, {"direct": False}),
    ],
)
def test_values(key: str, value: Any, parsed: Any) -> None:
    result = toy(**{key: value})[key]
    assert result == parsed
    assert type(result) is type(parsed)


@pytest.mark.parametrize("text", ["on", "yes", "true", "y", "off", "no", "false", "n"])
def test_bools(text: str) -> None:
    assert toy(lazy=text)["lazy"] is (text in ("on", "yes", "true", "y"))


def test_open_nodes_pass_unchanged() -> None:
    node = object()
    assert toy(backing=node)["backing"] is node


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("cluster_size", "abc", "cluster_size: 'abc' is not a size; write bytes"),
        ("cluster_size", "1.3k", "cluster_size: .*whole number of bytes"),
        ("cluster_size", "256", "cluster_size is '256'; it takes a size from 512 to 2M"),
        ("cluster_size", 4 << 20, "cluster_size is 4194304; it takes a size from 512 to 2M"),
        ("cluster_size", True, "cluster_size is True; it takes a size"),
        ("cluster_size", 1024.0, r"cluster_size is 1024\.0; it takes"),
        ("cluster_size", -1, "cluster_size is -1; it takes"),
        ("cluster_size", [], r"cluster_size is \[\]; it takes"),
        ("preallocation", "none", "preallocation is 'none'; it takes one of off, metadata, full"),
        ("preallocation", True, "preallocation is True; it takes one of"),
        ("refcount_bits", "3", "refcount_bits is '3'; it takes one of 1, 2, 4, 8, 16, 32, 64"),
        ("level", "10", "level is '10'; it takes a whole number from -1 to 9"),
        ("level", "-2", "level is '-2'"),
        ("level", "010", "level is '010'; it takes a whole number"),
        ("level", "1k", "level is '1k'"),
        ("level", " 1", "level is ' 1'"),
        ("level", "1_0", "level is '1_0'"),
        ("level", "", "level is ''"),
        ("level", "\u0663", "level is '\u0663'"),
        ("level", "9" * 5000, "level is '9"),
        ("level", False, "level is False"),
        ("lazy", "On", "lazy is 'On'; it takes on or off"),
        ("lazy", "1", "lazy is '1'"),
        ("lazy", 1, "lazy is 1; it takes on or off"),
        ("label", 5, "label is 5; it takes text"),
        ("label", {"a": "b"}, "label is {'a': 'b'}; it takes text"),
        ("backing", 5, "backing is 5; it takes a name or options"),
        ("backing", ["a"], r"backing is \['a'\]"),
        ("backing", b"a", "backing is b'a'"),
        ("backing", "foo:bar", "backing: 'foo:bar' names the protocol 'foo'"),
        ("inject-error", "x", "inject-error is 'x'; it takes a list"),
        ("inject-error", {"event": "x"}, "inject-error is .* it takes a list"),
        ("inject-error", ["x"], r"inject-error\.0 is 'x'; it takes a group of options"),
        ("inject-error", [{"event": "x"}, {}], r"inject-error\.1\.event is missing; set it to text"),
        ("inject-error", [{"event": "x", "errno": "EIO"}], r"inject-error\.0\.errno is 'EIO'; it takes a whole number"),
        ("inject-error", [{"evnt": "x"}], r"has no option 'evnt' in inject-error\.0; did you mean event\?"),
        ("children", ["a", 5], r"children\.1 is 5; it takes a name"),
        ("cache", "on", "cache is 'on'; it takes a group of options"),
        ("cache", {"direct": "maybe"}, r"cache\.direct is 'maybe'; it takes on or off"),
    ],
)
def test_values_refused(key: str, value: Any, said: str) -> None:
    with pytest.raises(OptionError, match=said) as caught:
        toy(**{key: value})
    assert len(str(caught.value)) < 400


def test_unknown_options_name_the_nearest_and_all() -> None:
    with pytest.raises(OptionError) as caught:
        toy(cluster_sze=512)
    assert "toy has no option 'cluster_sze'; did you mean cluster_size? it takes: file, backing, cluster_size" in str(
        caught.value
    )
    with pytest.raises(OptionError, match="has no option 'zzz'; it takes: file"):
        toy(zzz=1)
    with pytest.raises(OptionError, match="empty has no option 'a'; it takes: no options"):
        Schema("empty", []).parse({"a": 1})
    for key in (1, None, "x" * 1_000_000, "\x1b[2J"):
        with pytest.raises(OptionError, match="has no option") as caught:
            TOY.parse({"file": "x", key: 1})  # type: ignore[dict-item]
        assert len(str(caught.value)) < 500
        assert str(caught.value).isprintable()


def test_required_options() -> None:
    for options in ({}, {"file": None}, {"file": ""}):
        with pytest.raises(OptionError, match="file is missing; set it to a name or options"):
            TOY.parse(options)
    with pytest.raises(OptionError, match="event is missing"):
        RULE.parse({"event": None})


def test_aliases_lead_to_the_name() -> None:
    assert toy(**{"cluster-size": "4k"})["cluster_size"] == 4096
    with pytest.raises(OptionError, match="cluster_size is '1'"):
        toy(**{"cluster-size": "1"})
    with pytest.raises(OptionError, match="cluster_size is given twice, once as 'cluster-size'"):
        toy(**{"cluster_size": "4k", "cluster-size": "4k"})


def test_dotted_keys_nest() -> None:
    options = {"file.filename": "x", "cache.direct": True, "inject-error.0.event": "a", "inject-error.1.event": "b"}
    result = TOY.parse(options)
    assert result["file"] == {"filename": "x"}
    assert result["cache"] == {"direct": True}
    assert [rule["event"] for rule in result["inject-error"]] == ["a", "b"]
    node = object()
    assert TOY.parse({"file": node, "cache.direct": False})["file"] is node


def test_the_driver_may_be_said_again() -> None:
    assert "driver" not in TOY.parse({"driver": "toy", "file": "x"})
    with pytest.raises(OptionError, match="toy has no option 'driver'"):
        TOY.parse({"driver": "raw", "file": "x"})
    own = Schema("toy", [Option("driver", "str", "")])
    assert own.parse({"driver": "toy"}) == {"driver": "toy"}


def test_parsing_leaves_what_was_given_as_it_was() -> None:
    given_options = {"file": {"filename": "x"}, "inject-error": [{"event": "x"}]}
    before = json.dumps(given_options)
    result = TOY.parse(given_options)
    result["file"]["more"] = 1
    result["inject-error"][0]["more"] = 1
    assert json.dumps(given_options) == before


def test_schemas_extend() -> None:
    wider = CACHE.extend("wider", [Option("size", "size", "how much")])
    assert [option.name for option in wider.options] == ["size", "direct"]
    assert wider.parse({"direct": "on", "size": "1k"}) == {"size": 1024, "direct": True}
    assert wider["size"].doc == "how much"
    with pytest.raises(ValueError, match="a duplicate or contains a dot"):
        CACHE.extend("twice", [Option("direct", "str", "")])


def test_help() -> None:
    rows = {name: (kind, default, doc) for name, kind, default, doc in TOY.help()}
    assert rows["file"] == ("node", "required", "the storage")
    assert rows["cluster_size"] == ("size", "64k", "unit")
    assert rows["preallocation"] == ("off|metadata|full", "off", "what is allocated")
    assert rows["refcount_bits"] == ("1|2|4|8|16|32|64", "16", "width")
    assert rows["lazy"] == ("on|off", "on", "later")
    assert rows["level"] == ("int", "", "effort")
    assert rows["inject-error.N.event"] == ("str", "required", "when")
    assert rows["cache.direct"] == ("on|off", "off", "go around the cache")
    assert [row[0] for row in TOY.help()][:2] == ["file", "backing"]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (1, "1"), (1023, "1023"), (1024, "1k"), (1536, "1536"), (3 << 20, "3M"), (1 << 62, "4E")],
)
def test_sizes_are_spelled_exactly(value: int, text: str) -> None:
    assert Option("x", "size", "").spell(value) == text


def test_bad_declarations_are_refused() -> None:
    for kind in ("float", "enum", "list", "dict"):
        with pytest.raises(ValueError, match="unknown, or its choices or items are missing"):
            Option("x", kind, "")
    for options in (
        [Option("x", "str", ""), Option("x", "str", "")],
        [Option("x", "str", ""), Option("y", "str", "", aliases=("x",))],
        [Option("x.y", "str", "")],
    ):
        with pytest.raises(ValueError, match="a duplicate or contains a dot"):
            Schema("bad", options)
