"""Secrets: where they come from, what is refused, and that no text shows them."""

from __future__ import annotations

import base64
import os
import pickle
from pathlib import Path

import pytest

import lamina
from lamina.crypto import secret as module
from lamina.crypto.secret import MAX_BYTES, Secret, parse_object, reveal

WORD = b"open sesame\0\xff"


def test_each_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "with,comma"
    path.write_bytes(WORD)
    quoted = str(path).replace(",", ",,")
    monkeypatch.setitem(os.environb, b"LAMINA_TEST_SECRET", b"from \xff there")
    name, found, exposed = parse_object(f"secret,id=s0,file={quoted}")
    assert (name, found.reveal(), exposed) == ("s0", WORD, False)
    assert parse_object("secret,id=a,env=LAMINA_TEST_SECRET")[1].reveal() == b"from \xff there"
    assert parse_object("secret,id=a,data=it,,self")[1:][1] is True
    assert parse_object("qom-type=secret,id=a,data=it,,self")[1].reveal() == b"it,self"
    with path.open("rb") as file:
        assert parse_object(f"secret,id=a,fd={file.fileno()}")[1].reveal() == WORD
        assert os.fstat(file.fileno())
    path.write_bytes(base64.encodebytes(WORD * 40))
    assert parse_object(f"secret,id=a,format=base64,file={quoted}")[1].reveal() == WORD * 40


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("secret,file=x", "has no id"),
        ("secret,id=,data=hidden", "has no id"),
        ("secret,id=a", "needs one of"),
        ("secret,id=a,data=hidden,env=B", "needs one of"),
        ("secret,id=a,data=hidden,keyid=k,iv=v", "not known here: iv, keyid"),
        ("secret,id=a,data=hidden,format=hex", "neither raw nor base64"),
        ("secret,id=a,data=hidden,format=base64", "not base64"),
        ("tls-creds-x509,id=a,dir=hidden", "kind that is not known"),
        ("secret,id=a,data=hidden,hidden", "cannot be understood"),
        ("secret,id=a,data=hidden,data=hidden", "cannot be understood"),
        ("secret,id=a,env=LAMINA_NO_SUCH_VARIABLE", "not in the environment"),
        ("secret,id=a,fd=x", "not a number"),
        ("secret,id=a,fd=99999999999999999999", "not a number"),
        ("secret,id=a,fd=987654", "descriptor 987654"),
        ("secret,id=a,file=/no/such/file", "cannot be read"),
    ],
)
def test_what_is_refused_is_not_shown(text: str, match: str) -> None:
    with pytest.raises(lamina.LaminaError, match=match) as caught:
        parse_object(text)
    error: BaseException | None = caught.value
    while error is not None:
        assert "hidden" not in str(error).replace("hidden secret", "")
        error = error.__cause__


def test_a_secret_has_a_limit(tmp_path: Path) -> None:
    path = tmp_path / "long"
    path.write_bytes(bytes(2 * MAX_BYTES + 1))
    with pytest.raises(lamina.OptionError, match="longer than the limit"):
        parse_object(f"secret,id=a,file={path}")
    with path.open("rb") as file, pytest.raises(lamina.OptionError, match="longer than the limit"):
        parse_object(f"secret,id=a,fd={file.fileno()}")
    with pytest.raises(lamina.OptionError, match="longer than the limit"):
        Secret(bytes(MAX_BYTES + 1))


def test_no_text_shows_it(monkeypatch: pytest.MonkeyPatch) -> None:
    secret = Secret("open sesame")
    assert "sesame" not in f"{secret} {secret!r} {[secret]} {vars(lamina).get('x')}"
    with pytest.raises(TypeError, match="pickle"):
        pickle.dumps(secret)
    monkeypatch.setitem(module.named, "s0", secret)
    assert reveal("s0") == reveal(secret) == b"open sesame"
    for given in ("s1", None, 5, b"open sesame"):
        with pytest.raises(lamina.OptionError) as caught:
            reveal(given)
        assert "sesame" not in str(caught.value)
