"""The objects of qemu-nbd that say who may connect (`--tls-authz`), as rules for `lamina serve --tls-rules`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ...errors import OptionError, UnsupportedFeature, printable
from ...limits import MIB
from ...named_file import read_named

_SWITCHES = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


def client_rules(given: Mapping[str, Any]) -> str:
    """The value of `--tls-rules` for the object `given`. UnsupportedFeature for a kind that is not known here, OptionError
    where the object is not valid; what its rules contain is checked by the command."""
    kind = given.get("qom-type")
    rest = {key: value for key, value in given.items() if key not in ("qom-type", "id")}
    if kind == "authz-simple":
        identity = _only(rest, "identity")
        return _inline({"rules": [{"match": identity, "policy": "allow"}]})
    if kind == "authz-list":
        return _inline(rest)
    if kind == "authz-listfile":
        refresh = _SWITCHES.get(str(rest.pop("refresh", "on")))
        if refresh is None:
            raise OptionError("refresh of an object authz-listfile is on or off")
        path = _only(rest, "filename")
        if refresh:
            return f"./{path}" if path.startswith("json:") else path
        content, _ = read_named(path, MIB + 1, failure="the rules of --tls-authz cannot be read")
        return f"json:{content.decode(errors='surrogateescape')}"
    raise UnsupportedFeature(
        f"objects of the kind {printable(str(kind))} are not supported here",
        hint="use authz-simple, authz-list or authz-listfile",
    )


def _inline(rules: Mapping[str, Any]) -> str:
    return f"json:{json.dumps(rules)}"


def _only(given: Mapping[str, Any], key: str) -> str:
    """The value of the one option that an object has."""
    value = given.get(key)
    if not isinstance(value, str) or not value:
        raise OptionError(f"the object of --tls-authz has no {key}", hint=f"give it {key}=...")
    for other in given:
        if other != key:
            raise OptionError(f"the object of --tls-authz has no option {printable(other)}")
    return value
