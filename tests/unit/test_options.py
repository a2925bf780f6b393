"""Names and option lists: every spelling of a graph of nodes, and what is said about one that is wrong.

Longer than 500 lines: most of it are tables, a line for each spelling that is read or refused, in the order of the module.
"""

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
from lamina.limits import MAX_SIZE
from lamina.options import (
    MAX_DEPTH,
    MAX_TEXT,
    asks_for_help,
    flatten,
    format_size,
    nest,
    parse_keyval,
    parse_name,
    parse_range,
    parse_size,
    to_json_name,
    to_keyval,
)
from lamina.schema import Option

if TYPE_CHECKING:
    from tests.conftest import Qemu

# -- sizes

SIZES = {
    "0": 0,
    "00": 0,
    "512": 512,
    "010": 10,
    "10b": 10,
    "10B": 10,
    "+1": 1,
    " 1": 1,
    "1k": 1024,
    "1K": 1024,
    "4M": 4 << 20,
    "4m": 4 << 20,
    "1.5G": 3 << 29,
    "1.50G": 3 << 29,
    "1T": 1 << 40,
    "1p": 1 << 50,
    "1e": 1 << 60,
    "7E": 7 << 60,
    "5.": 5,
    "1.0": 1,
    "1.0b": 1,
    "0.5k": 512,
    "0x200": 512,
    "0X1F": 31,
    "0x1b": 27,
    "0x1e": 30,
}
NO_SIZES = ["", " ", ".", "k", ".k", "x", "0x", "0xg", "0x200k", "0x1.8k", "1kb", "1 k", "1 ", "1\n", "1e3", "1.5.5k"]
NO_SIZES += [
    "1s",
    "10%",
    "inf",
    "nan",
    "1_000",
    "-1",
    "-1k",
    "--1",
    "++1",
    "1,5k",
    "\u0663",
    "\uff11k",
    "1\u212a",
    "\xb2",
    "1\0",
    "k1",
]


@pytest.mark.parametrize(("text", "size"), SIZES.items())
def test_sizes(text: str, size: int) -> None:
    assert parse_size(text) == size
    assert parse_size(text, exact=False) == size


@pytest.mark.parametrize("text", [*NO_SIZES, "9" * 65, "9" * 100_000, "1" * 100_000 + "x"])
def test_what_is_no_size(text: str) -> None:
    started = time.perf_counter()
    for exact in (True, False):
        with pytest.raises(OptionError, match=r"is not a size; write bytes.*1\.5G") as caught:
            parse_size(text, exact=exact)
        assert len(str(caught.value)) < 400
    assert time.perf_counter() - started < 1


def test_fractions_of_a_byte() -> None:
    for text in ("1.3k", "0.1k", "1.5", "0.5b", "0.0001M"):
        with pytest.raises(OptionError, match="not a whole number of bytes"):
            parse_size(text)
    for text, size in (("1.1k", 1126), ("1.2k", 1229), ("0.1k", 102), ("1.9999k", 2048)):
        assert parse_size(text, exact=False) == size
    with pytest.raises(OptionError, match="not a whole number"):
        parse_size("1.5", exact=False)
    # Exact where a float is not.
    assert parse_size("4503599627370495.5k") == 4503599627370495 * 1024 + 512


def test_largest_size() -> None:
    assert parse_size("9223372036854775807") == parse_size("0x7fffffffffffffff") == (1 << 63) - 1
    for text in ("9223372036854775808", "8E", "0x8000000000000000", "99999999999999E", "7.9999999999999999999999E"):
        with pytest.raises(OptionError, match=r"too large|not a whole"):
            parse_size(text)


@given(st.integers(0, (1 << 63) - 1))
def test_a_number_of_bytes_is_its_size(size: int) -> None:
    assert parse_size(str(size)) == parse_size(hex(size)) == parse_size(f"{size}B") == size
    assert parse_size(Option("x", "size", "").spell(size)) == size


@given(st.integers(0, (1 << 33) - 1), st.integers(0, 3), st.sampled_from("kMGkmg"))
def test_fractions_are_exact_or_refused(number: int, digits: int, suffix: str) -> None:
    text = f"{number // 10**digits}.{number % 10**digits:0{digits}d}{suffix}" if digits else f"{number}{suffix}"
    unit = {"k": 1 << 10, "m": 1 << 20, "g": 1 << 30}[suffix.lower()]
    if number * unit % 10**digits == 0:
        assert parse_size(text) == number * unit // 10**digits
    else:
        with pytest.raises(OptionError):
            parse_size(text)


@pytest.mark.peers
def test_sizes_mean_what_they_mean_to_qemu_io(qemu: Qemu) -> None:
    accepted = [text for text in SIZES if parse_size(text) < 4 << 60 and text.strip() == text] + [
        "1.1k",
        "1.2k",
        "0.1k",
        "1.9999k",
        "0.00001M",
    ]
    commands = [part for text in accepted for part in ("-c", f"read {text} 0")]
    output = qemu.io("--image-opts", "driver=null-co,size=4E,read-zeroes=on", *commands, check=False).stdout
    said = [int(line.rsplit(" ", 1)[1]) for line in output.splitlines() if line.startswith("read 0/0")]
    assert said == [parse_size(text, exact=False) for text in accepted]


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1 KiB"),
        (1536, "1.5 KiB"),
        (65536, "64 KiB"),
        (197120, "192 KiB"),
        (999 * 1024, "999 KiB"),
        (1000 * 1024, "0.977 MiB"),
        (1 << 20, "1 MiB"),
        (3 << 29, "1.5 GiB"),
        (12345679360, "11.5 GiB"),
        (1234567890432, "1.12 TiB"),
        (1 << 50, "1 PiB"),
        (1 << 60, "1 EiB"),
        ((1 << 63) - 1, "8 EiB"),
    ],
)
def test_sizes_for_people(size: int, text: str) -> None:
    assert format_size(size) == text


@pytest.mark.peers
def test_sizes_are_written_as_qemu_img_does(qemu: Qemu) -> None:
    sizes = [0, 512, 1024, 1536, 999 * 1024, 1000 * 1024, 1023488, 65536, 123456789504, 1126400000, 11 << 58, 1 << 60]
    for size in sizes:
        output = qemu.img("info", f'json:{{"driver":"null-co","size":{size}}}').stdout
        assert f"virtual size: {format_size(size)} ({size} bytes)" in output


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


ABSENT = "foo: : c: foo.x: FILE: JSON: raw: qcow2: fat: vvfat: http:// https:// ssh:// iscsi:// rbd: nbd+vsock://"


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


# Ranges


@pytest.mark.parametrize(
    ("text", "start", "end"),
    [
        ("0-1", 0, 1),
        ("512-1k", 512, 1024),
        (" 0x200-0x400 ", 512, 1024),
        ("1.5M-", 3 << 19, MAX_SIZE),
        (f"0-{MAX_SIZE}", 0, MAX_SIZE),
    ],
)
def test_ranges(text: str, start: int, end: int) -> None:
    assert parse_range(text) == (start, end)


@pytest.mark.parametrize("text", ["", "-", "1M", "-5", "5-5", "6-5", "1-2-3", "a-b", "0-8E", f"{MAX_SIZE}-"])
def test_no_ranges(text: str) -> None:
    with pytest.raises(OptionError):
        parse_range(text)
