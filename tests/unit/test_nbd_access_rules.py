"""Ordered rules for the subjects of verified certificates."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from lamina.errors import LaminaError
from lamina.nbd.access_rules import AccessRules
from lamina.nbd.tls import allowed, peer_names

SUBJECT = ((("countryName", "DE"),), (("organizationName", "A, B"),), (("commonName", "back\\up"),))
NAMES = peer_names({"subject": SUBJECT, "subjectAltName": (("DNS", "host.example"),)})
#: The subject in the order of the certificate.
WRITTEN = "C=DE,O=A\\, B,CN=back\\\\up"


def rule(match: str, policy: str = "allow", format: str = "exact") -> dict[str, str]:
    return {"match": match, "policy": policy, "format": format}


@pytest.mark.parametrize(
    ("given", "verdict"),
    [
        ({}, False),
        ({"policy": "allow"}, True),
        ({"rules": [rule(WRITTEN)]}, True),
        ({"rules": [rule(NAMES[0])]}, False),  # the order of RFC 4514
        ({"rules": [rule(WRITTEN + "X")]}, False),
        ({"rules": [rule(WRITTEN[:-1])]}, False),
        ({"rules": [rule(WRITTEN.lower())]}, False),
        ({"rules": [rule("dns:host.example")]}, False),  # another name of the same certificate
        ({"rules": [rule("C=DE*")]}, False),  # a pattern only where it is said
        ({"rules": [rule("C=DE*", format="glob")]}, True),
        ({"rules": [rule("C=DE", format="glob")]}, False),  # the whole subject
        ({"rules": [rule("C=?E*", format="glob")]}, True),
        ({"rules": [rule("C=[D]E*", format="glob")]}, False),  # no sets
        ({"rules": [rule("*dns*", format="glob")]}, False),
        ({"rules": [rule("*", "deny", "glob"), rule("C=DE*", format="glob")]}, False),  # the first decides
        ({"rules": [rule("C=DE*", format="glob"), rule("*", "deny", "glob")]}, True),
        ({"policy": "allow", "rules": [rule("*O=A*", "deny", "glob")]}, False),
        ({"policy": "allow", "rules": [rule("*O=B*", "deny", "glob")]}, True),
    ],
)
def test_who_is_admitted(given: dict[str, Any], verdict: bool) -> None:
    assert AccessRules(given).admits(NAMES) is verdict
    assert allowed(NAMES, AccessRules.from_text(f"json:{json.dumps(given)}")) is verdict


def test_a_certificate_without_a_subject_is_not_admitted() -> None:
    """A rule that denies its subject cannot be got around by having none."""
    rules = AccessRules({"policy": "allow"})
    assert not rules.admits(())
    assert not rules.admits(["dns:host.example"])
    assert not rules.admits(["uri:CN=x"])


@pytest.mark.parametrize(
    "given",
    [
        [],
        "deny",
        {"policy": 1},
        {"rules": {}},
        {"rules": ["CN=x"]},
        {"rules": [{"match": "CN=x"}]},
        {"rules": [{"policy": "allow"}]},
        {"rules": [rule("CN=x", format="regex")]},
        {"rules": [rule("CN=x") | {"other": 1}]},
        {"other": 1},
        {"rules": [rule("CN=x")] * 10_001},
    ],
    ids=repr,
)
def test_rules_that_are_refused(given: object) -> None:
    with pytest.raises(LaminaError):
        AccessRules(given)


def test_a_file_is_read_again_when_it_changes(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "rules"

    def write(text: str) -> None:
        other = tmp_path / "new"
        other.write_text(text)
        os.replace(other, path)

    write('{"policy": "allow"}')
    rules = AccessRules.from_text(str(path))
    assert rules.admits(NAMES)
    write('{"policy": "deny"}')
    assert not rules.admits(NAMES)
    write('{"policy": "allow"}')
    assert rules.admits(NAMES)
    for break_ in (lambda: write("{"), path.unlink, lambda: write(" " * (1 << 20) + "{}")):
        break_()
        assert not rules.admits(NAMES)  # nobody, rather than those of before
        assert "until the rules can be read" in caplog.text
        caplog.clear()
    write('{"policy": "allow"}')
    assert rules.admits(NAMES)


def test_a_pattern_takes_no_time_that_grows_with_a_power() -> None:
    rules = AccessRules({"rules": [rule("*a" * 200 + "b", format="glob")]})
    assert not rules.admits(["CN=" + "a" * 20_000])
