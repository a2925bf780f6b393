"""The objects of qemu-nbd that say who may connect (`--tls-authz`), as names for `lamina serve --tls-allow`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import OptionError, UnsupportedFeature, printable
from ...limits import MIB
from ...named_file import read_named

#: The most bytes of a file with rules.
_MOST = MIB
_OFF = ("off", "no", "false")


def allowed_names(given: Mapping[str, Any]) -> list[str]:
    """The names of certificates that the object `given` admits, at least one. UnsupportedFeature where it is no list of
    allowed names; OptionError where it is not valid, or admits nobody."""
    kind = given.get("qom-type")
    if kind == "authz-simple":
        names = [given.get("identity")]
    elif kind == "authz-list":
        names = _names(given)
    elif kind == "authz-list-file":
        names = _names(_rules_in(given))
    else:
        raise UnsupportedFeature(
            f"objects of the kind {printable(str(kind))} are not supported here",
            hint="use lamina serve --tls-allow NAME",
        )
    if not names or not all(isinstance(name, str) and name for name in names):
        raise OptionError("the object of --tls-authz admits nobody", hint="give it an identity, or rules with a match")
    return [str(name) for name in names]


def _names(given: Mapping[str, Any]) -> list[Any]:
    """The names of a list of rules."""
    rules = given.get("rules", [])
    if given.get("policy", "deny") != "deny" or not isinstance(rules, list):
        raise UnsupportedFeature("only lists that admit names are supported here", hint="give it policy=deny and rules")
    for rule in rules:
        if not isinstance(rule, Mapping):
            raise OptionError(
                "a rule of the object of --tls-authz has no match", hint="give it match=NAME,policy=allow"
            )
        if rule.get("policy") != "allow" or rule.get("format", "exact") != "exact":
            raise UnsupportedFeature(
                "a rule that denies, or has a pattern, is not supported here",
                hint="use rules with policy=allow and format=exact",
            )
    return [rule.get("match") for rule in rules]


def _rules_in(given: Mapping[str, Any]) -> Mapping[str, Any]:
    """What the file of an `authz-list-file` contains."""
    path = given.get("filename")
    if not isinstance(path, str):
        raise OptionError("an object authz-list-file has no file", hint="give it filename=PATH")
    if str(given.get("refresh", "on")) not in _OFF:
        raise UnsupportedFeature(
            "the file of an authz-list-file is read once, and not again when it changes",
            path=path,
            hint="add refresh=off, and restart the server after a change",
        )
    content, _ = read_named(path, _MOST + 1, failure="the rules of --tls-authz cannot be read")
    try:
        found = json.loads(content) if len(content) <= _MOST else None
    except (ValueError, RecursionError):
        found = None
    if not isinstance(found, Mapping):
        raise OptionError("the file of rules is no JSON object of at most 1 MiB", path=path)
    return found
