"""Credentials for TLS that a command line names by an object: certificates, or pre-shared keys, in a folder.

`--object tls-creds-x509,id=NAME,endpoint=client,dir=FOLDER[,verify-peer=on|off]` and `--object
tls-creds-psk,id=NAME,endpoint=client,dir=FOLDER[,username=USER]`, whose keys are in `keys.psk`. Storage over a network has an
option that names one of them.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..errors import Hint, OptionError, UnsupportedFeature, printable
from ..options import shown

#: The kinds of objects that are credentials.
KINDS = ("tls-creds-x509", "tls-creds-psk")
_BOOLS = {"on": True, "yes": True, "true": True, "off": False, "no": False, "false": False}


class Credentials(NamedTuple):
    """One object. `folder`: that of certificates, None with keys; `keys`: the file of pre-shared keys, with the `username`
    of a client. `verify`: whether the certificate of the peer is checked. `server`: for a server, not for a client."""

    folder: str | None
    keys: str | None
    verify: bool
    username: str | None
    server: bool


#: The credentials that options may name by their id, of all images of this program: a command line fills it (`--object`).
named: dict[str, Credentials] = {}


def parse(given: Mapping[str, Any]) -> tuple[str, Credentials]:
    """The id and the credentials of an object with the options `given`, whose `qom-type` is one of KINDS."""
    options = dict(given)
    kind, name = options.pop("qom-type"), options.pop("id", None)
    if not isinstance(name, str) or not name:
        raise OptionError("credentials have no id", hint="add id=NAME to the object")
    folder, endpoint = options.pop("dir", None), options.pop("endpoint", "client")
    verify = _BOOLS.get(options.pop("verify-peer", "on"))
    username = options.pop("username", None) if kind == "tls-creds-psk" else None
    for ignored in ("priority", "sanity-check"):  # of another library; and checks that are always made
        options.pop(ignored, None)
    if not isinstance(folder, str) or endpoint not in ("client", "server") or verify is None:
        raise OptionError(
            f"the credentials {printable(name)} need dir=FOLDER, endpoint=client or server, and verify-peer=on or off",
            hint="tls-creds-x509,id=NAME,endpoint=client,dir=FOLDER",
        )
    if options:
        raise UnsupportedFeature(
            f"the credentials {printable(name)} have options that are not supported: {shown(', '.join(options))}",
            hint="give dir, endpoint, verify-peer and username",
        )
    server = endpoint == "server"
    if kind == "tls-creds-psk":
        return name, Credentials(None, os.path.join(folder, "keys.psk"), True, username, server)
    return name, Credentials(folder, None, verify, None, server)


def node_options(name: str) -> dict[str, Any]:
    """The options of storage that stand for the credentials `name`. OptionError if no object has that id, or for a server."""
    found = named.get(name)
    if found is None:
        raise OptionError(
            f"there are no credentials with the id {shown(name)}",
            hint=Hint(
                "give the options tls-certificates or tls-psk-file in their place",
                command="name them with --object tls-creds-x509,id=NAME,endpoint=client,dir=FOLDER",
            ),
        )
    if found.server:
        raise OptionError(
            f"the credentials {shown(name)} are those of a server", hint="add endpoint=client to the object"
        )
    if found.keys is not None:
        user = {} if found.username is None else {"tls-username": found.username}
        return {"tls": "require", "tls-psk-file": found.keys, **user}
    return {"tls": "require", "tls-certificates": found.folder, "tls-verify-peer": found.verify}
