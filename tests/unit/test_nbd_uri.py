"""NBD URIs and QEMU's spellings: the tables of the specification, what is refused, and that a target's URI names it."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lamina.crypto import credentials
from lamina.errors import LaminaError, OptionError, UnsupportedFeature
from lamina.nbd.uri import DEFAULT_PORT, MAX_EXPORT_NAME, Target, from_options, parse
from lamina.options import parse_keyval


@pytest.mark.parametrize(
    ("uri", "export"),
    [
        ("nbd://example.com/disk", "disk"),
        ("nbd+unix:///disk?socket=sock", "disk"),
        ("nbd://example.com/", ""),
        ("nbd://example.com", ""),
        ("nbd://example.com//disk", "/disk"),
        ("nbd://example.com/hello%20world", "hello world"),
        ("nbd://example.com/a/b", "a/b"),
        ("nbd://example.com/a+b", "a+b"),
        ("nbd://example.com/%C3%BC%0A%25", "ü\n%"),
        ("nbd://example.com/ü", "ü"),
    ],
)
def test_export_names(uri: str, export: str) -> None:
    assert parse(uri).export == export


@pytest.mark.parametrize(
    ("uri", "target"),
    [
        ("nbd://example.com", Target("example.com")),
        ("NBD://example.com:10810/x", Target("example.com", 10810, export="x")),
        ("nbd+tcp://example.com:/x", Target("example.com", export="x")),
        ("nbd://", Target("localhost")),
        ("nbd:///x", Target("localhost", export="x")),
        ("nbd://[::1]", Target("::1")),
        ("nbd://[2001:db8::1]:1/x", Target("2001:db8::1", 1, export="x")),
        ("nbd://[fe80::1%25eth0]/", Target("fe80::1%eth0")),
        ("nbd://h?", Target("h")),
        ("nbds://h", Target("h", tls="require")),
        ("nbds+tcp://h", Target("h", tls="require")),
        ("nbd+unix:///?socket=/run/a%20b+c", Target(socket="/run/a b+c")),
        ("nbd+unix:///?socket=%00/abstract", Target(socket="\0/abstract")),
        ("nbd+unix:///?socket=%FF", Target(socket="\udcff")),
        ("nbds+unix:///?socket=s&tls-hostname=h", Target(socket="s", tls="require", tls_hostname="h")),
        ("nbd://alice@h/", Target("h", username="alice")),
        ("nbd://h/?tls-type=x509", Target("h", tls="allow")),
        ("nbd://h/?tls-hostname=g", Target("h", tls="allow", tls_hostname="g")),
        ("nbds://h/?tls-verify-peer=0", Target("h", tls="require", tls_verify_peer=False)),
        ("nbds://h/?tls-verify-peer=1", Target("h", tls="require")),
        ("nbds://h/?tls-certificates=/pki", Target("h", tls="require", tls_certificates="/pki")),
        (
            "nbds+unix://al%2Eice@/?socket=s&tls-psk-file=/k",
            Target(socket="s", tls="require", tls_type="psk", username="al.ice", tls_psk_file="/k"),
        ),
        ("nbd:unix:/run/s", Target(socket="/run/s")),
        ("nbd:unix:/run/s:exportname=a%20b", Target(socket="/run/s", export="a%20b")),
        ("nbd:h:10809", Target("h")),
        ("nbd:h:1:exportname=x:y", Target("h", 1, export="x:y")),
        ("nbd:[::1]:2:exportname=", Target("::1", 2)),
    ],
)
def test_what_a_uri_names(uri: str, target: Target) -> None:
    assert parse(uri) == target
    assert parse(str(target)) == target


@pytest.mark.parametrize(
    ("uri", "says"),
    [
        ("http://h/", "scheme"),
        ("nbd+ssh://h/", "scheme"),
        ("nbd", "not the address"),
        ("nbd:h", "not the address"),
        ("nbds:h:1", "not the address"),
        ("nbd:::1:1", "not the address"),
        ("nbd:[1]:1", "IPv6"),
        ("nbd:unix:", "socket"),
        ("nbd://-oCommand=x/", "host"),
        ("nbd://%2DoCommand=x/", "host"),
        ("nbd:-x:1", "host"),
        ("nbds://h/?tls-hostname=-x", "tls-hostname"),
        ("nbd://h:0/", "port"),
        ("nbd://h:65536/", "port"),
        ("nbd://h:1_0/", "port"),
        ("nbd://h:+1/", "port"),
        ("nbd://h:\u0661/", "port"),
        ("nbd://::1/", "several colons"),
        ("nbd://[::1/", "not an address"),
        ("nbd://[::1]x/", "not an address"),
        ("nbd://[127.0.0.1]/", "IPv6"),
        ("nbd://[::1%25]/", "IPv6"),
        ("nbd://a%2Fb/", "host"),
        ("nbd://a%00b/", "host"),
        ("nbd://user:secret@h/", "password"),
        ("nbd://@h/", "user name"),
        ("nbd://h/#x", "not a URI"),
        ("nbd://h/a b", "not a URI"),
        ("nbd://h/a\nb", "control character"),
        ("nbd://h/\x7f", "control character"),
        ("nbd://h/%", "%"),
        ("nbd://h/%4", "%"),
        ("nbd://h/% 4", "not a URI"),
        ("nbd://h/%+4", "%"),
        ("nbd://h/%zz", "%"),
        ("nbd://h/%FF", "UTF-8"),
        ("nbd://h/a%00b", "NUL"),
        ("nbd://h/\ud800", "surrogate"),
        ("nbd://h/" + "x" * (MAX_EXPORT_NAME + 1), "4097 bytes"),
        ("nbd://h/?socket=s", "socket"),
        ("nbd+unix:///x", "socket"),
        ("nbd+unix:///?socket=", "socket"),
        ("nbd+unix:///?socket=a%00b", "socket"),
        ("nbd+unix:///?socket=" + "x" * 108, "longer than 107"),
        ("nbd+unix://h/?socket=s", "both"),
        ("nbd+unix:///?socket=a&socket=b", "twice"),
        ("nbd+unix:///?socket", "no value"),
        ("nbd+unix:///?socket=a&", "no parameter"),
        ("nbd://h/?tls-hostnme=x", "did you mean tls-hostname"),
        ("nbd://h/?x-secret=1", "no parameter"),
        ("nbds://h/?tls-type=ssh", "tls-type"),
        ("nbds://h/?tls-type=psk", "do not agree"),
        ("nbds://h/?tls-type=x509&tls-psk-file=k", "do not agree"),
        ("nbds://h/?tls-certificates=c&tls-psk-file=k", "do not agree"),
        ("nbds://h/?tls-certificates=", "tls-certificates"),
        ("nbds://h/?tls-verify-peer=maybe", "0 or 1"),
        ("nbd://h/" + "x" * (1 << 21), "characters"),
    ],
)
def test_what_is_refused(uri: str, says: str) -> None:
    with pytest.raises(OptionError, match=says) as caught:
        parse(uri)
    assert len(str(caught.value)) < 700
    assert caught.value.hint


def test_anonymous_tls_is_refused_as_a_feature() -> None:
    with pytest.raises(UnsupportedFeature, match="authentication"):
        parse("nbds://h/?tls-type=anon")


def test_the_longest_names_are_taken() -> None:
    assert parse("nbd://h/" + "x" * MAX_EXPORT_NAME).export == "x" * MAX_EXPORT_NAME
    assert parse("nbd+unix:///?socket=" + "s" * 107).socket == "s" * 107


TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=30)
WORDS = st.text(st.sampled_from("abz09.-_ü~+!"), min_size=1, max_size=20).filter(lambda word: word[0] != "-")
HOSTS = st.one_of(WORDS, st.ip_addresses(v=6).map(str), st.just("fe80::1%25x"), st.ip_addresses(v=4).map(str))
PATHS = (
    st.binary(min_size=1, max_size=60)
    .filter(lambda data: b"\0" not in data)
    .map(lambda d: d.decode("utf-8", "surrogateescape"))
)


@st.composite
def targets(draw: Any) -> Target:
    fields: dict[str, Any] = {"export": draw(TEXT), "username": draw(st.none() | WORDS)}
    if draw(st.booleans()):
        fields |= {"host": draw(HOSTS), "port": draw(st.integers(1, 65535) | st.just(DEFAULT_PORT))}
    else:
        fields["socket"] = draw(st.sampled_from(["", "\0"])) + draw(PATHS)
    fields["tls"] = draw(st.sampled_from(["off", "allow", "require"]))
    if fields["tls"] != "off":
        fields["tls_hostname"] = draw(st.none() | WORDS)
        fields["tls_verify_peer"] = draw(st.booleans())
        if draw(st.booleans()):
            fields |= {"tls_type": "psk", "tls_psk_file": draw(PATHS)}
        else:
            fields["tls_certificates"] = draw(st.none() | PATHS)
    return Target(**fields)


@given(targets())
def test_the_uri_of_a_target_names_it(target: Target) -> None:
    uri = str(target)
    assert uri.isascii()
    assert parse(uri) == target
    assert from_options({"uri": uri}) == target


@given(st.text(max_size=60) | st.text(st.sampled_from("nbds+unix:/?=&%@[]#.:-socket0Ff\0\n"), max_size=60))
def test_any_text_is_a_target_or_an_option_error(text: str) -> None:
    for uri in (text, "nbd://" + text, "nbd+unix:///?socket=" + text, "nbd:" + text):
        try:
            target = parse(uri)
        except LaminaError:
            continue
        assert parse(str(target)) == target


@pytest.mark.parametrize(
    ("options", "target"),
    [
        ({"host": "h"}, Target("h")),
        ({"host": "h", "port": "10810", "export": "x"}, Target("h", 10810, export="x")),
        ({"path": "/s"}, Target(socket="/s")),
        ({"server.type": "inet", "server.host": "::1", "server.port": "1"}, Target("::1", 1)),
        ({"server": {"type": "unix", "path": "/s"}, "export": "x"}, Target(socket="/s", export="x")),
        ({"server": {"type": "unix", "path": "a", "abstract": True}}, Target(socket="\0a")),
        ({"uri": "nbd://h/x"}, Target("h", export="x")),
        ({"uri": "nbd://h/x", "tls": "require"}, Target("h", export="x", tls="require")),
        ({"uri": "nbd://h/x", "tls-certificates": "/c"}, Target("h", export="x", tls="require", tls_certificates="/c")),
        ({"host": "h", "tls-hostname": "g"}, Target("h", tls="require", tls_hostname="g")),
        ({"host": "h", "tls": "allow", "tls-verify-peer": "off"}, Target("h", tls="allow", tls_verify_peer=False)),
        (
            {"host": "h", "tls-psk-file": "/k", "tls-username": "u"},
            Target("h", tls="require", tls_type="psk", tls_psk_file="/k", username="u"),
        ),
    ],
)
def test_options(options: dict[str, Any], target: Target) -> None:
    assert from_options(options) == target


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({}, "nothing"),
        ({"port": 1}, "unclear"),
        ({"host": "h", "path": "/s"}, "host, path"),
        ({"path": "/s", "port": 1}, "unclear"),
        ({"uri": "nbd://h", "export": "x"}, "unclear"),
        ({"uri": "nbds://h", "tls": "off"}, "contradicts"),
        ({"uri": "nbds://h?tls-hostname=a", "tls-hostname": "b"}, "tls-hostname differs"),
        ({"server": {"type": "inet", "path": "/s"}}, "server.host"),
        ({"server": {"type": "unix", "path": "/s", "host": "h"}}, "server.path"),
        ({"server": {"type": "vsock"}}, "server.type"),
        ({"host": "-h"}, "host"),
        ({"hst": "h"}, "did you mean host"),
        ({"host": "h", "port": 0}, "port"),
        ({"host": "h", "tls": "off", "tls-hostname": "x"}, "tls is off"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], says: str) -> None:
    with pytest.raises(OptionError, match=says):
        from_options(options)


def test_credentials_by_the_id_of_an_object(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(OptionError, match="tls-certificates or tls-psk-file") as caught:
        from_options({"host": "h", "tls-creds": "tls0"})
    assert "--object tls-creds-x509" in caught.value.command_text()
    for text, expected in (
        ("tls-creds-x509,id=tls0,dir=/pki", {"tls_certificates": "/pki", "tls_verify_peer": True, "tls_type": "x509"}),
        ("tls-creds-x509,id=tls0,dir=/pki,verify-peer=off,endpoint=client", {"tls_verify_peer": False}),
        ("tls-creds-psk,id=tls0,dir=/pki,username=me", {"tls_psk_file": "/pki/keys.psk", "username": "me"}),
    ):
        name, found = credentials.parse(parse_keyval(text, implied="qom-type"))
        monkeypatch.setitem(credentials.named, name, found)
        target = from_options({"host": "h", "tls-creds": "tls0"})
        assert target.tls == "require"
        assert {key: getattr(target, key) for key in expected} == expected
    server = credentials.parse({"qom-type": "tls-creds-x509", "id": "tls0", "dir": "/pki", "endpoint": "server"})[1]
    monkeypatch.setitem(credentials.named, "tls0", server)
    with pytest.raises(OptionError, match="those of a server"):
        from_options({"host": "h", "tls-creds": "tls0"})
    assert "--object tls-creds-x509" in caught.value.command_text()


@pytest.mark.parametrize(
    "text", ["dir=x", "id=a", "id=a,dir=x,endpoint=both", "id=a,dir=x,verify-peer=1", "id=a,dir=x,y=z"]
)
def test_credentials_that_are_refused(text: str) -> None:
    with pytest.raises(LaminaError):
        credentials.parse({"qom-type": "tls-creds-x509", **parse_keyval(text)})


def test_places_for_people_and_replacement() -> None:
    assert Target("::1").place == "[::1]:10809"
    assert Target(socket="\0x").place == "@x"
    assert Target("h").replace(export="x") == Target("h", export="x")
    with pytest.raises(OptionError):
        Target("h").replace(port=0)


def test_nothing_heavy_is_imported() -> None:
    code = "import sys, lamina.nbd.uri as u; u.parse('nbd+unix:///?socket=s'); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert not {"ssl", "socket", "urllib.parse", "dataclasses", "numpy"} & set(done.stdout.split())
