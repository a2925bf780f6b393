"""The tool qemu-nbd: its command line for `lamina serve`, and its list of exports."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import quote

from ...crypto.credentials import KINDS, Credentials, parse
from ...errors import OptionError, UnsupportedFeature, UsageError, printable
from ...options import parse_keyval
from .authz import client_rules
from .grammar import NBD, Found
from .tool import Tool

if TYPE_CHECKING:
    from ...nbd.inspect import Inspection

#: The names of the transmission flags in the list of exports, by bit.
_FLAGS = (
    *("", "readonly", "flush", "fua", "rotational", "trim", "zeroes", "df", "multi", "resize", "cache", "fast-zero"),
    "block-status-payload",
)
#: Options that mean the same to `lamina serve`, which has them under the same names.
_SAME = (
    *("export-name", "description", "offset", "pid-file", "format", "load-snapshot", "aio", "detect-zeroes"),
    *("socket", "handshake-limit", "bitmap", "selinux-label"),
)
_SAME_FLAGS = ("persistent", "fork", "verbose", "allocation-depth", "snapshot", "image-opts")
#: Options that need the kernel.
_MISSING = {
    "connect": "devices of the kernel are not supported: use nbd-client",
    "disconnect": "devices of the kernel are not supported: use nbd-client",
}
#: The version that knows extended headers, and the flag of an export that belongs to them.
_EXTENDED = (8, 2)
_PAYLOAD = 1 << 12
#: More clients than any server has: -e 0.
_UNLIMITED = 65535


class NbdTool(Tool):
    """qemu-nbd."""

    name = "qemu-nbd"
    server_name = "qemu-nbd"
    announces = False
    offers_depth_always = False

    def command_line(self, arguments: Sequence[str]) -> list[str]:
        found = NBD.parse(arguments)
        if found.last("help") is not None:
            from .texts import nbd_help

            sys.stdout.write(nbd_help())
            raise SystemExit(0)
        if found.last("version") is not None:
            self.show_version()
        for name, why in _MISSING.items():
            if found.last(name) is not None:
                raise UnsupportedFeature(f"--{name}: {why}")
        if found.last("list") is not None:
            return self._list(found)
        if len(found.operands) != 1:
            raise UsageError("one image is needed", hint="qemu-nbd --help lists the options")
        words = [f"--{name}" for name in _SAME_FLAGS if found.last(name) is not None]
        words += [f"--{name}={value}" for name, value in found.options if name in _SAME]
        words += _access(found)
        words += _address(found)
        words += _clients(found)
        words += _security(found)
        return ["serve", *words, "--", *found.operands]

    def _list(self, found: Found) -> list[str]:
        if found.operands:
            raise UsageError("--list lists the exports of a server, and takes no image", hint="omit the image")
        scheme, query = "nbd", []
        if (name := found.last("tls-creds")) is not None:
            credentials = _credentials(found, name)
            if credentials.server:
                raise OptionError("the credentials are those of a server", hint="add endpoint=client to the object")
            scheme = "nbds"
            query = [("tls-certificates", credentials.folder), ("tls-psk-file", credentials.keys)]
            query.append(("tls-verify-peer", None if credentials.verify else "0"))
            query.append(("tls-hostname", found.last("tls-hostname")))
        export, user = quote(found.last("export-name") or ""), ""
        if name is not None and credentials.username is not None:
            user = f"{quote(credentials.username)}@"
        if (path := found.last("socket")) is not None:
            query.insert(0, ("socket", os.path.abspath(path)))
            uri = f"{scheme}+unix://{user}/{export}"
        else:
            host, port = found.last("bind") or "localhost", found.last("port") or "10809"
            uri = f"{scheme}://{user}{f'[{host}]' if ':' in host else host}:{port}/{export}"
        words = "&".join(f"{key}={quote(value)}" for key, value in query if value is not None)
        return ["info", "--list", "--", f"{uri}?{words}" if words else uri]

    def exports(self, found: Sequence[Inspection]) -> str:
        lines = [f"exports available: {len(found)}"]
        for one in found:
            lines += self._export(one)
        return "".join(f"{line}\n" for line in lines)

    def _export(self, one: Inspection) -> Iterable[str]:
        details = one.details
        yield f" export: '{printable(one.name)}'"
        if one.description:
            yield f"  description: {printable(one.description)}"
        if details is None:
            return
        yield f"  size:  {details.size}"
        # A client that does not ask for extended headers is told of nothing that needs them.
        flags = details.flags if self.version >= _EXTENDED else details.flags & ~_PAYLOAD
        words = [name for bit, name in enumerate(_FLAGS) if name and flags >> bit & 1]
        yield f"  flags: {flags:#x} ({''.join(f' {word}' for word in words)} )"
        if one.block_sizes:
            yield f"  min block: {details.minimum}"
            yield f"  opt block: {details.preferred}"
            yield f"  max block: {details.maximum_told}"
        if self.version >= _EXTENDED:
            yield f"  transaction size: {64 if details.mode == 'extended' else 32}-bit"
        if one.contexts:
            yield f"  available meta contexts: {len(one.contexts)}"
            yield from (f"   {printable(name)}" for name in one.contexts)


def _access(found: Found) -> list[str]:
    """Who may write, and how the image is opened."""
    read_only = found.last("read-only") is not None or found.last("load-snapshot") is not None
    words = ["--read-only"] if read_only else [] if found.last("snapshot") is not None else ["--writable"]
    if read_only and found.last("snapshot") is not None:
        words = []  # nothing that clients write stays
    cache = found.last("cache") or ("none" if found.last("nocache") is not None else "writeback")
    words.append(f"--cache={cache}")
    return [*words, f"--discard={found.last('discard') or 'ignore'}"]


def _address(found: Found) -> list[str]:
    port, bind = found.last("port"), found.last("bind")
    if found.last("socket") is not None:
        if port is not None or bind is not None:
            raise OptionError("a Unix socket has neither a port nor an address", hint="omit -p and -b, or -k")
        return []
    # The tool listens on all addresses, without TLS, unless told otherwise.
    return [f"--port={port or 10809}", f"--bind={bind or '0.0.0.0'}", "--insecure"]


def _clients(found: Found) -> list[str]:
    text = found.last("shared") or "1"
    if not text.isascii() or not text.isdecimal() or len(text) > 9:
        raise OptionError(f"the number of clients is {printable(text)}", hint="give -e 1 or more; 0: any number")
    return [f"--shared={int(text) or _UNLIMITED}"]


def _objects(found: Found) -> dict[object, dict[str, Any]]:
    """The objects of the command line by id, without secrets."""
    texts = (value for name, value in found.options if name == "object" and not _is_secret(value))
    parsed = [parse_keyval(text, implied="qom-type", last_wins=True) for text in texts]
    return {given.get("id"): given for given in parsed}


def _is_secret(text: str) -> bool:
    return text.startswith(("secret,", "qom-type=secret,"))


def _credentials(found: Found, name: str) -> Credentials:
    given = _named(found, name, "--tls-creds")
    if given.get("qom-type") not in KINDS:
        raise UnsupportedFeature("the kind of credentials is not supported", hint=f"use {' or '.join(KINDS)}")
    return parse(given)[1]


def _named(found: Found, name: str, option: str) -> dict[str, Any]:
    objects = _objects(found)
    if name not in objects:
        raise OptionError(f"{option}: there is no object {printable(name)}", hint="give its --object before it")
    return objects[name]


def _security(found: Found) -> list[str]:
    """The options for TLS, and secrets, from the objects of the command line."""
    words = [f"--object={value}" for name, value in found.options if name == "object" and _is_secret(value)]
    if (name := found.last("tls-creds")) is not None:
        credentials = _credentials(found, name)
        if not credentials.server:
            raise OptionError("the credentials are those of a client", hint="add endpoint=server to the object")
        if credentials.keys is not None:
            words.append(f"--tls-psk-file={credentials.keys}")
        else:
            words += [
                f"--tls-certificates={credentials.folder}",
                *(["--tls-verify-peer"] if credentials.verify else []),
            ]
    if (name := found.last("tls-authz")) is not None:
        words.append(f"--tls-rules={client_rules(_named(found, name, '--tls-authz'))}")
    return words
