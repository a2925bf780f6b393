"""Names and option lists: every notation of a graph of nodes, and the messages for wrong ones."""

from __future__ import annotations

import json
import time
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.errors import OptionError
from lamina.options import (
    MAX_DEPTH,
    MAX_TEXT,
    asks_for_help,
    flatten,
    nest,
    parse_keyval,
    parse_name,
    to_json_name,
    to_keyval,
)

if TYPE_CHECKING:
    from tests.conftest import Qemu

# -- nested options

KEYS = st.text(st.characters(exclude_characters=".,=", exclude_categories=[]), min_size=1, max_size=6).filter(
    lambda key: not key.isdecimal()
)
TEXTS = st.text(
    st.one_of(st.sampled_from(",=.:{}' \"\\ä\u20ac\U0001f4be"), st.characters(exclude_categories=[])), max_size=9
)


def nested(leaves: st.SearchStrategy[Any], *, empty: bool) -> st.SearchStrategy[dict[str, Any]]:
    at_least = 0 if empty else 1
    values = st.recursive(
        leaves,
        lambda inner: (
            st.dictionaries(KEYS, inner, min_size=at_least, max_size=4) | st.lists(inner, min_size=at_least, max_size=4)
        ),
        max_leaves=12,
    )
    return st.dictionaries(KEYS, values, max_size=5)


SCALARS = TEXTS | st.booleans() | st.integers(-(1 << 64), 1 << 64) | st.none()


@given(nested(TEXTS, empty=False))
def test_keyval_round_trip(options: dict[str, Any]) -> None:
    assert parse_keyval(to_keyval(options)) == options
    if options:
        assert parse_keyval(to_keyval(options) + ",") == options


@given(nested(SCALARS, empty=True))
def test_json_name_round_trip(options: dict[str, Any]) -> None:
    name = to_json_name(options)
    assert name.isascii()
    assert parse_name(name) == options


@given(nested(SCALARS, empty=True))
def test_nest_is_the_inverse_of_flatten(options: dict[str, Any]) -> None:
    flat = flatten(options)
    assert nest(flat) == options
    assert nest(options) == options
    assert not any(isinstance(value, dict | list) and value for value in flat.values())


@given(st.text(st.sampled_from("a.,=0123b"), max_size=24))
def test_any_option_list_is_read_or_refused(text: str) -> None:
    try:
        options = parse_keyval(text)
    except OptionError:
        return
    assert parse_keyval(to_keyval(options)) == options


@given(st.text(max_size=40) | st.text(st.sampled_from('jsonblkdebugverifynbd:/.[]{}",1a+?='), max_size=40))
def test_any_name_is_read_or_refused(text: str) -> None:
    try:
        options = parse_name(text)
    except OptionError:
        return
    assert isinstance(options, dict)


def test_flatten() -> None:
    children = [{"file": {"filename": "a"}}, "b"]
    options: dict[str, Any] = {"driver": "quorum", "children": children, "none": {}, "empty": [], "n": None}
    assert flatten(options) == {
        "driver": "quorum",
        "children.0.file.filename": "a",
        "children.1": "b",
        "none": {},
        "empty": [],
        "n": None,
    }
    assert flatten({}) == {}


def test_nest_reads_dotted_keys_at_every_level() -> None:
    options = MappingProxyType(
        {"file.driver": "file", "file": {"cache.direct": True}, "list": ({"a.b": 1},), "list.1.a": 2}
    )
    assert nest(options) == {"file": {"driver": "file", "cache": {"direct": True}}, "list": [{"a": {"b": 1}}, {"a": 2}]}
    given_group: dict[str, Any] = {}
    assert nest({"a": given_group, "a.b": 1}) == {"a": {"b": 1}} == nest({"a.b": 1, "a": given_group})
    assert given_group == {}


@pytest.mark.parametrize(
    ("text", "options"),
    [
        ("", {}),
        ("driver=qcow2,file.filename=x,,y", {"driver": "qcow2", "file": {"filename": "x,y"}}),
        ("a=b=c", {"a": "b=c"}),
        ("a=", {"a": ""}),
        ("a=,b=", {"a": "", "b": ""}),
        ("a=1,", {"a": "1"}),
        ("a=,,", {"a": ","}),
        ("a=,,,b=1", {"a": ",", "b": "1"}),
        ("a=,,,,", {"a": ",,"}),
        ("a= b ", {"a": " b "}),
        ("a=\U0001f4be,ä.ö=ü", {"a": "\U0001f4be", "ä": {"ö": "ü"}}),
        ("children.0=a,children.1.file=b", {"children": ["a", {"file": "b"}]}),
        ("children.1=b,children.0=a", {"children": ["a", "b"]}),
        ("r.0.event=x,r.0.errno=5,r.1.event=y", {"r": [{"event": "x", "errno": "5"}, {"event": "y"}]}),
        ("l.0.0=a,l.0.1=b", {"l": [["a", "b"]]}),
        ("l.0=a,l.x=b", {"l": {"0": "a", "x": "b"}}),
        ("0=a", {"0": "a"}),
        (",".join(f"l.{n}={n}" for n in range(11)), {"l": [str(n) for n in range(11)]}),
    ],
)
def test_keyval(text: str, options: dict[str, Any]) -> None:
    assert parse_keyval(text) == options


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("qcow2", r"'qcow2' has no value; write key=value; ,, is a comma"),
        ("driver=raw,help", r"'help' has no value"),
        ("a=1,,b=2,c", r"'c' has no value"),
        ("fi,,le=x", r"'fi,le=x' has no value"),
        (",", r"'' has no value"),
        ("a=1,,,", None),
        ("a=1,,,,,b", r"'b' has no value"),
        ("=x", r"option name '' has an empty part"),
        (".a=x", r"'.a' has an empty part"),
        ("a.=x", r"'a.' has an empty part"),
        ("a..b=x", r"'a..b' has an empty part"),
        ("a=1,a=2", r"'a' is given twice"),
        ("file=x,file.driver=y", r"'file.driver' is given twice, or 'file' is both a value and a group"),
        ("file.driver=y,file=x", r"'file' is given twice, or 'file' is both a value and a group"),
        ("a.b.c=1,a.b=2", r"'a.b' is given twice, or 'b' is both"),
        ("a.0=1,a.2=2", r"the list 'a' has no item 1"),
        ("x.a.1=1", r"the list 'x.a' has no item 0"),
        ("a.00=1", r"the list 'a' has no item 0"),
    ],
)
def test_keyval_refused(text: str, said: str | None) -> None:
    if said is None:
        assert parse_keyval(text)
        return
    with pytest.raises(OptionError, match=said):
        parse_keyval(text)


def test_keyval_bounds() -> None:
    assert len(flatten(parse_keyval(".".join("a" * MAX_DEPTH) + "=x"))) == 1
    for text in (".".join("a" * (MAX_DEPTH + 1)) + "=x", "a." * 100_000 + "a=x"):
        with pytest.raises(OptionError, match="empty part or too many parts") as caught:
            parse_keyval(text)
        assert len(str(caught.value)) < 300
    assert parse_keyval("a=" + "x" * (MAX_TEXT - 2)) == {"a": "x" * (MAX_TEXT - 2)}
    with pytest.raises(OptionError, match="1048577 characters"):
        parse_keyval("a=" + "x" * (MAX_TEXT - 1))


def test_keyval_takes_time_in_proportion_to_its_length() -> None:
    started = time.perf_counter()
    parse_keyval("a=" + "," * (MAX_TEXT - 2))
    parse_keyval(",".join(f"k{n}=" for n in range(100_000)))
    parse_keyval("k." * 31 + "k=" + "=" * 900_000)
    with pytest.raises(OptionError):
        parse_keyval("a" * MAX_TEXT)
    assert time.perf_counter() - started < 10


def test_first_item_may_imply_its_key() -> None:
    assert parse_keyval("secret,id=s0", implied="qom-type") == {"qom-type": "secret", "id": "s0"}
    assert parse_keyval("a,,b", implied="name") == {"name": "a,b"}
    assert parse_keyval("id=s0", implied="name") == {"id": "s0"}
    with pytest.raises(OptionError, match="'secret' has no value"):
        parse_keyval("id=s0,secret", implied="name")
    with pytest.raises(OptionError, match="'name' is given twice"):
        parse_keyval("a,name=b", implied="name")


def test_last_of_a_repeated_key_may_win() -> None:
    assert parse_keyval("a=1,b.c=2,a=3,b.c=4", last_wins=True) == {"a": "3", "b": {"c": "4"}}
    with pytest.raises(OptionError, match="both a value and a group"):
        parse_keyval("a=1,a.b=2", last_wins=True)


@pytest.mark.parametrize("text", ["help", "?", "a=1,help", "help,a=1", "a=1,?"])
def test_asks_for_help(text: str) -> None:
    assert asks_for_help(text)


@pytest.mark.parametrize("text", ["", "a=1", "a=help", "help=on", "a=1,,help", "helper", "a=b,,?"])
def test_does_not_ask_for_help(text: str) -> None:
    assert not asks_for_help(text)


def test_to_keyval_says_what_it_can_and_refuses_the_rest() -> None:
    assert to_keyval({"a": True, "b": False, "n": -5, "l": ["x,y", {"z": ""}]}) == "a=on,b=off,n=-5,l.0=x,,y,l.1.z="
    unsayable: list[Any] = [None, 1.5, {}, [], b"x", Path("x")]
    for value in unsayable:
        with pytest.raises(OptionError, match="cannot be written as key=value; write json:"):
            to_keyval({"a": {"b": value}})
    for key in ("a,b", "a=b"):
        with pytest.raises(OptionError, match="cannot be written as key=value"):
            to_keyval({key: "x"})


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"x", object()])
def test_to_json_name_refuses_what_json_cannot_say(value: Any) -> None:
    with pytest.raises(OptionError, match="cannot be written as JSON"):
        to_json_name({"a": value})


@pytest.mark.parametrize("function", [nest, flatten, to_keyval])
def test_keys_that_name_nothing(function: Any) -> None:
    for key in ("", "a.", ".", 1, None, b"a"):
        with pytest.raises(OptionError, match="empty part"):
            function({"x": {key: "v"}})
    deep: Any = "v"
    for _ in range(MAX_DEPTH + 1):
        deep = [deep]
    with pytest.raises(OptionError, match="too deep"):
        function({"x": deep})
    cycle: dict[str, Any] = {}
    cycle["a"] = cycle
    with pytest.raises(OptionError, match="too deep"):
        function(cycle)


# -- names


def file(path: str) -> dict[str, Any]:
    return {"driver": "file", "filename": path}


def inet(host: str, port: str) -> dict[str, Any]:
    return {"driver": "nbd", "server": {"type": "inet", "host": host, "port": port}}


def unix(path: str) -> dict[str, Any]:
    return {"driver": "nbd", "server": {"type": "unix", "path": path}}


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("disk.qcow2", file("disk.qcow2")),
        ("/a/b c,d=e", file("/a/b c,d=e")),
        ("./foo:bar", file("./foo:bar")),
        ("a/foo:bar", file("a/foo:bar")),
        ("/nbd://x", file("/nbd://x")),
        ("\udcff\u20ac", file("\udcff\u20ac")),
        ("file:x", file("x")),
        ("file:foo:bar", file("foo:bar")),
        ("file:///tmp/x", file("///tmp/x")),
        ("file:json:{}", file("json:{}")),
        ("host_device:/dev/sda", {"driver": "host_device", "filename": "/dev/sda"}),
        ("blkdebug:rules:disk", {"driver": "blkdebug", "config": "rules", "image": file("disk")}),
        ("blkdebug::disk", {"driver": "blkdebug", "image": file("disk")}),
        ("blkdebug:/a/b:/c/d", {"driver": "blkdebug", "config": "/a/b", "image": file("/c/d")}),
        ("blkdebug:x:./a:b", {"driver": "blkdebug", "config": "x", "image": file("./a:b")}),
        (
            "blkdebug::blkdebug:x:d",
            {"driver": "blkdebug", "image": {"driver": "blkdebug", "config": "x", "image": file("d")}},
        ),
        ('blkdebug::json:{"driver":"null"}', {"driver": "blkdebug", "image": {"driver": "null"}}),
        ("blkdebug::nbd://h/e", {"driver": "blkdebug", "image": {"driver": "nbd", "uri": "nbd://h/e"}}),
        ("blkverify:raw:disk", {"driver": "blkverify", "raw": file("raw"), "test": file("disk")}),
        ("blkverify:raw:nbd:h:1", {"driver": "blkverify", "raw": file("raw"), "test": inet("h", "1")}),
        ("nbd:unix:/run/s", unix("/run/s")),
        ("nbd:unix:/a:b", unix("/a:b")),
        ("nbd:unix:/run/s:exportname=", {**unix("/run/s"), "export": ""}),
        ("nbd:unix:/s:exportname=a:exportname=b", {**unix("/s"), "export": "a:exportname=b"}),
        ("nbd:localhost:10809", inet("localhost", "10809")),
        ("nbd:localhost:nbd", inet("localhost", "nbd")),
        ("nbd:[::1]:10809", inet("::1", "10809")),
        ("nbd:h:1:exportname=x:y", {**inet("h", "1"), "export": "x:y"}),
        ("null:", {"driver": "null"}),
        ("null-co://", {"driver": "null"}),
        ("null-aio://", {"driver": "null"}),
        ("null-co://?size=1.5G", {"driver": "null", "size": "1.5G"}),
        ("null:?size=512", {"driver": "null", "size": "512"}),
        ('json:{"driver":"qcow2","file.filename":"x"}', {"driver": "qcow2", "file": {"filename": "x"}}),
        ('json: {"a": 1, "b": [true, null, "x"]} ', {"a": 1, "b": [True, None, "x"]}),
        ('json:{"file.filename":"x","file":{"driver":"file"}}', {"file": file("x")}),
        ('json:{"r":[{"event":"x"}],"r.1.event":"y"}', {"r": [{"event": "x"}, {"event": "y"}]}),
        ('json:{"file": "json:{}"}', {"file": "json:{}"}),
        ("json:{}", {}),
    ],
)
def test_names(name: str, options: dict[str, Any]) -> None:
    assert parse_name(name) == options


@pytest.mark.parametrize(
    "uri", ["nbd://", "nbd://h:1/x", "nbds://h", "nbd+tcp://h", "nbd+unix:///e?socket=/s:1", "nbds+unix:///"]
)
def test_uris_of_nbd_are_passed_on(uri: str) -> None:
    assert parse_name(uri) == {"driver": "nbd", "uri": uri}


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("", "file name '' is empty"),
        ("file:", "file name '' is empty"),
        ("a\0b", "contains a NUL"),
        ("blkdebug::", "file name '' is empty"),
        ("blkdebug:x", "'blkdebug:x' has no second colon.*write blkdebug:CONFIG:IMAGE"),
        ("blkverify:x", "'blkverify:x' has no second colon.*write blkverify:RAW:IMAGE"),
        ("blkverify::x", "file name '' is empty"),
        ("blkdebug:" * 10_000 + "x", "nested too deeply"),
        ("blkdebug::" * 33 + "x", "nested too deeply"),
        ("x" * (MAX_TEXT + 1), "too long"),
        ("nbd:", "not the address of an NBD server; write nbd:unix:PATH"),
        ("nbd:foo", "not the address"),
        ("nbd:foo:", "not the address"),
        ("nbd::10809", "not the address"),
        ("nbd:unix:", "not the address"),
        ("nbd:unix::exportname=x", "not the address"),
        ("nbd:h:1:x", "not the address"),
        ("nbd:[::1]", "not the address"),
        ("nbd:[::1]:", "not the address"),
        ("nbd:[]:1", "not the address"),
        ("nbd:[::1]:1:x", "not the address"),
        ("nbd:/x", "not the address"),
        ("nbd+unix:/x", "not the address"),
        ("nbds:h:1", "not the address"),
        ("null:x", "a null device has no option 'x'"),
        ("null-co://?size", "a null device has no"),
        ("null-co:?size=1&x=2", None),
        ("json:", "cannot be read"),
        ("json:[1]", r"is \[1\], not an object"),
        ("json:null", "is None"),
        ("json:{'driver':'raw'}", "double quotes"),
        ('json:{"a":1,}', "cannot be read"),
        ('json:{"a":1} x', "cannot be read"),
        ('json:{"a":1,"a":2}', "given twice in one object"),
        ('json:{"x":{"a":1,"a":2}}', "given twice in one object"),
        ('json:{"a":NaN}', "NaN is not JSON"),
        ('json:{"a":-Infinity}', "-Infinity is not JSON"),
        ('json:{"a":' + "9" * 5000 + "}", "cannot be read"),
        ('json:{"file.a":1,"file":{"a":2}}', "'file.a' is given twice"),
        ('json:{"file":"x","file.driver":"y"}', "both a value and a group"),
        ('json:{"":1}', "empty part"),
        ('json:{"a":' + "[" * 33 + "]" * 33 + "}", "too deep"),
        ('json:{"a":' * 100_000, "cannot be read"),
        ('json:{"a":' + "[" * 200_000, "cannot be read"),
    ],
)
def test_names_refused(name: str, said: str | None) -> None:
    if said is None:
        assert parse_name(name)  # the schema of the driver refuses that size
        return
    with pytest.raises(OptionError, match=said) as caught:
        parse_name(name)
    assert len(str(caught.value)) < 500


ABSENT = "foo: : c: foo.x: FILE: JSON: raw: qcow2: nbd+vsock://"


@pytest.mark.parametrize("name", [f"{prefix}x" for prefix in ABSENT.split()] + ["a b:x", "\x1b[2J:x"])
def test_protocols_that_are_not_there(name: str) -> None:
    with pytest.raises(
        OptionError, match=r"which is unknown; for a file of that name write \./NAME or file:NAME"
    ) as caught:
        parse_name(name)
    assert str(caught.value).isprintable()


def test_many_keys_under_a_long_one_are_cheap() -> None:
    inner = ",".join(f'"k{n}":1' for n in range(20_000))
    started = time.perf_counter()
    parse_name('json:{"' + "x" * 500_000 + '":{' + inner + "}}")
    assert time.perf_counter() - started < 10


@pytest.mark.peers
def test_names_and_options_mean_what_they_mean_to_qemu_img(
    qemu: Qemu, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    name = "a,b=c:d\u20ac"
    (tmp_path / name).write_bytes(bytes(1536))
    options = {"driver": "raw", "file": file(name)}

    def size(*arguments: str) -> int:
        info: dict[str, Any] = json.loads(qemu.img("info", "--output=json", *arguments).stdout)
        return int(info["virtual-size"])

    assert size("--image-opts", to_keyval(options)) == 1536
    assert size(to_json_name(options)) == 1536
    assert size("-f", "raw", f"./{name}") == size("-f", "raw", f"file:{name}") == 1536
    assert parse_name(f"./{name}")["filename"] == f"./{name}"
    refused = [
        name,
        "foo:bar",
        ":bar",
        "raw:x",
        "FILE:x",
        "nbd:foo",
        "blkdebug:x",
        'json:{"a":1,"a":2}',
        'json:{"a":1,}',
        "",
    ]
    for other in refused:
        with pytest.raises(OptionError):
            parse_name(other)
        assert qemu.img("info", other, check=False).returncode == 1


@pytest.mark.parametrize("depth", [101, 5000, 100_000])
def test_json_that_is_nested_deeply_is_refused_before_it_is_parsed(depth: int) -> None:
    for text in ("[" * depth, '{"a":' * depth, '{"driver": "raw", "x": ' + "[" * depth + "]" * depth + "}"):
        with pytest.raises(OptionError, match="nested more than 100 levels"):
            parse_name("json:" + text)
    assert parse_name('json:{"driver": "raw", "name": "' + "[" * depth + '"}')["name"] == "[" * depth


@pytest.mark.parametrize(
    "name", ["http://host/disk", "https://host/disk", "ssh://host/disk", "rbd:pool/disk", "fat:folder"]
)
def test_a_protocol_that_is_known_and_not_there_says_so(name: str) -> None:
    with pytest.raises(OptionError, match="is not supported") as raised:
        parse_name(name)
    assert "did you mean" not in str(raised.value)
