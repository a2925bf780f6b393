"""Where an NBD export is: NBD URIs, QEMU's spellings and QEMU's options, all read into one `Target`.

Follows "The NBD Uniform Resource Indicator (URI) format" (doc/uri.md beside the protocol). Pure: nothing is looked up
or connected, and nothing heavy is imported. What is given here may come from anywhere: hosts that look like options,
control characters, unknown or repeated parameters are refused, not passed on.

Which words mean TLS: `nbds` and `nbds+unix` *require* it. `nbd` alone means none. `nbd` with a `tls-` parameter *allows*
it: used if the server offers it, and anyone between the two can take the offer away; write `nbds` where that matters.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any, NamedTuple

from ..crypto.credentials import node_options
from ..errors import OptionError, UnsupportedFeature
from ..options import MAX_TEXT, parse_seconds, shown
from ..schema import Option, Schema

#: The port that IANA gave to NBD.
DEFAULT_PORT = 10809
#: Export names are UTF-8 of at most this many bytes (the protocol's bound for all strings).
MAX_EXPORT_NAME = 4096
#: The longest path of a Unix socket in bytes (Linux: 108 with the NUL that ends it).
MAX_SOCKET_PATH = 107

#: Scheme -> whether it names a Unix socket, whether it requires TLS.
_SCHEMES = {
    "nbd": (False, False),
    "nbd+tcp": (False, False),
    "nbds": (False, True),
    "nbds+tcp": (False, True),
    "nbd+unix": (True, False),
    "nbds+unix": (True, True),
}
_TLS_PARAMETERS = ("tls-type", "tls-hostname", "tls-verify-peer", "tls-certificates", "tls-psk-file")
_PARAMETERS = ("socket", "timeout", *_TLS_PARAMETERS)
_TRUTH = {"1": True, "true": True, "0": False, "false": False}
_SAFE = frozenset(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~/")

#: The options of the `nbd` driver that say where the export is; a driver adds its own to them. Names are QEMU's.
OPTIONS = (
    Option("uri", "str", "an NBD URI, instead of the options that follow"),
    Option("host", "str", "host name or address; the same as server.host"),
    Option("port", "int", "TCP port (default 10809); the same as server.port", minimum=1, maximum=65535),
    Option("path", "str", "Unix socket; the same as server.path"),
    Option(
        "server",
        "dict",
        "the server's address",
        items=Schema(
            "server",
            [
                Option("type", "enum", "the kind of address", choices=("inet", "unix"), required=True),
                Option("host", "str", "host name or address (inet)"),
                Option("port", "int", "TCP port (inet)", minimum=1, maximum=65535),
                Option("path", "str", "path of the socket (unix)"),
                Option("abstract", "bool", "whether the path is a name without a file (unix)", default=False),
            ],
        ),
    ),
    Option("export", "str", "name of the export", aliases=("exportname",)),
    Option(
        "tls", "enum", "whether to encrypt: allow can be undone by an attacker", choices=("off", "allow", "require")
    ),
    Option("tls-creds", "str", "the id of credentials (--object tls-creds-x509 or tls-creds-psk)"),
    Option("tls-hostname", "str", "the name that the server's certificate must have, if not that of the host"),
    Option("tls-verify-peer", "bool", "whether to check the server's certificate (default on)"),
    Option("tls-certificates", "str", "folder with ca-cert.pem, client-cert.pem, client-key.pem"),
    Option("tls-psk-file", "str", "file with lines USER:HEXKEY"),
    Option("tls-username", "str", "the user of the pre-shared key"),
    Option(
        "timeout",
        "any",
        "seconds without progress after which the server counts as gone; 0: never (default: 60; 600 while it flushes, trims "
        "or zeroes)",
        aliases=("request-timeout",),
    ),
)
_SCHEMA = Schema("nbd", OPTIONS)


class _Fields(NamedTuple):
    #: Host name or address without brackets; None for a Unix socket.
    host: str | None = None
    port: int = DEFAULT_PORT
    #: Path of a Unix socket; one that begins with NUL is in the abstract namespace. None for TCP.
    socket: str | None = None
    #: Name of the export; the empty name is the server's default one.
    export: str = ""
    #: "off", "allow" (opportunistic: open to downgrade) or "require".
    tls: str = "off"
    #: "x509" or "psk".
    tls_type: str = "x509"
    #: Who we are, where the server asks for that (pre-shared keys).
    username: str | None = None
    #: The name that the certificate must have; None means that of the host.
    tls_hostname: str | None = None
    tls_verify_peer: bool = True
    #: The folder of certificates; None means the authorities that this system trusts.
    tls_certificates: str | None = None
    tls_psk_file: str | None = None
    #: Seconds without progress after which the server counts as gone, whatever it does; 0: never. None: the usual times.
    timeout: float | None = None


class Target(_Fields):
    """Where an export is and how to reach it; immutable, and consistent: an OptionError says what is not.

    `str()` is its URI, and `parse(str(target)) == target` for every target.
    """

    __slots__ = ()

    def __new__(cls, *fields: Any, **named: Any) -> Target:
        target = super().__new__(cls, *fields, **named)
        _check(target)
        return target

    def replace(self, **fields: Any) -> Target:
        """This target with other `fields`, checked again."""
        return Target(**(self._asdict() | fields))

    @property
    def place(self) -> str:
        """The server alone, for people: `example.com:10809`, `[::1]:10809`, `/run/nbd.sock`, `@abstract`."""
        if self.socket is not None:
            return f"@{self.socket[1:]}" if self.socket.startswith("\0") else self.socket
        return f"[{self.host}]:{self.port}" if ":" in (self.host or "") else f"{self.host}:{self.port}"

    def __str__(self) -> str:
        scheme = "nbds" if self.tls == "require" else "nbd"
        user = "" if self.username is None else _quote(self.username) + "@"
        query = []
        if self.socket is not None:
            start = f"{scheme}+unix://{user}"
            query.append("socket=" + _quote(os.fsencode(self.socket)))
        else:
            host = self.host or ""
            host = f"[{host.replace('%', '%25')}]" if ":" in host else _quote(host)
            start = f"{scheme}://{user}{host}" + (f":{self.port}" if self.port != DEFAULT_PORT else "")
        if self.tls == "allow" or self.tls_type != "x509":
            query.append(f"tls-type={self.tls_type}")
        if self.tls_hostname is not None:
            query.append("tls-hostname=" + _quote(self.tls_hostname))
        if not self.tls_verify_peer:
            query.append("tls-verify-peer=0")
        for name, path in (("tls-certificates", self.tls_certificates), ("tls-psk-file", self.tls_psk_file)):
            if path is not None:
                query.append(f"{name}={_quote(os.fsencode(path))}")
        if self.timeout is not None:
            query.append("timeout=" + f"{self.timeout:.6f}".rstrip("0").rstrip("."))
        return f"{start}/{_quote(self.export)}" + ("?" + "&".join(query) if query else "")

    format = __str__


def parse(text: str) -> Target:
    """The target that `text` names: an NBD URI, or QEMU's `nbd:HOST:PORT` or `nbd:unix:PATH`, both with
    `:exportname=NAME` after them if the export has a name. OptionError if it is anything else."""
    if len(text) > MAX_TEXT:
        raise OptionError(f"the NBD address has {len(text)} characters", hint=f"at most {MAX_TEXT} are read")
    if any(c < " " or c == "\x7f" for c in text):
        raise OptionError(f"{shown(text)} has a control character", hint="write it as %XX, two hexadecimal digits")
    scheme, _, rest = text.partition(":")
    if not rest.startswith("//"):
        return _parse_qemu(text, scheme, rest)
    kind = _SCHEMES.get(scheme.lower())
    if kind is None:
        known = ", ".join(word for word in _SCHEMES if "+tcp" not in word)
        raise OptionError(f"{shown(text)}: the scheme {shown(scheme)} is not one of NBD", hint=f"known: {known}")
    if "#" in text or " " in text:
        wrong = "#" if "#" in text else " "
        raise OptionError(f"{shown(text)} is not a URI: it holds {wrong!r}", hint=f"write %{ord(wrong):02X} for it")
    unix, required = kind
    before, _, query = rest[2:].partition("?")
    authority, _, path = before.partition("/")
    fields: dict[str, Any] = {"export": _text(path, "the export name")}
    parameters = _parameters(query)
    user, at, place = authority.rpartition("@")
    if at:
        if ":" in user:
            raise OptionError("the URI holds a password", hint="NBD has none; keep keys in a tls-psk-file")
        fields["username"] = _text(user, "the user name")
    if unix:
        if place:
            hint = "write nbd+unix:///EXPORT?socket=PATH, with three slashes"
            raise OptionError(f"{shown(text)} names both a Unix socket and the host {shown(place)}", hint=hint)
        if "socket" not in parameters:
            raise OptionError(f"{shown(text)} lacks the socket", hint="add ?socket=PATH")
        fields["socket"] = parameters.pop("socket")
    else:
        if "socket" in parameters:
            raise OptionError(f"{shown(text)} has a socket, but its scheme means TCP", hint="write nbd+unix:///EXPORT")
        fields["host"], fields["port"] = _host_and_port(place)
    if "timeout" in parameters:
        fields["timeout"] = parse_timeout(parameters.pop("timeout"))
    fields["tls"] = "require" if required else "allow" if parameters else "off"
    if "tls-verify-peer" in parameters:
        word = parameters.pop("tls-verify-peer")
        if word not in _TRUTH:
            raise OptionError(f"tls-verify-peer is {shown(word)}", hint="it takes 0 or 1")
        fields["tls_verify_peer"] = _TRUTH[word]
    fields.update((name.replace("-", "_"), value) for name, value in parameters.items())
    if "tls_psk_file" in fields:
        fields.setdefault("tls_type", "psk")
    return Target(**fields)


def parse_timeout(value: object) -> float:
    """The time limit that `value`, a number or its text, says: seconds, perhaps with a fraction; 0 for none. OptionError."""
    return parse_seconds(value, "the timeout")


def from_options(options: Mapping[str, Any]) -> Target:
    """The target that options of the `nbd` driver name (`OPTIONS` alone: a driver keeps its others to itself).

    Keys may be dotted or nested, values text or typed; absent and None mean the same. OptionError as `Schema.parse`,
    and if the address is missing or given twice.
    """
    given = {name: value for name, value in _SCHEMA.parse(options).items() if value is not None}
    if "tls-creds" in given:
        given |= node_options(given.pop("tls-creds"))
    address = _address(given)
    tls = {
        "tls_hostname": given.get("tls-hostname"),
        "tls_verify_peer": given.get("tls-verify-peer"),
        "tls_certificates": given.get("tls-certificates"),
        "tls_psk_file": given.get("tls-psk-file"),
        "username": given.get("tls-username"),
    }
    fields = {name: value for name, value in tls.items() if value is not None}
    if "timeout" in given:
        fields["timeout"] = parse_timeout(given["timeout"])
    if "uri" in given:
        target = parse(given["uri"])
        for name, value in fields.items():
            if name != "timeout" and getattr(target, name) not in (value, _Fields._field_defaults[name]):
                raise OptionError(f"{name.replace('_', '-')} differs from what the URI says", hint="give it once")
        if target.tls == "require" and given.get("tls", "require") != "require":
            raise OptionError(f"tls={given['tls']} contradicts the URI, which requires TLS", hint="leave tls out")
        mode = given.get("tls", target.tls)
        fields = target._asdict() | fields
    else:
        fields |= address | {"export": given.get("export", "")}
        mode = given.get("tls", "off")
    # Options that mean TLS mean it: only tls=allow, said in so many words, makes encryption optional.
    wanted = any(value is not None for name, value in tls.items() if name.startswith("tls_"))
    if mode == "off" and wanted and "tls" not in given:
        mode = "require"
    psk = fields.get("tls_psk_file") is not None
    return Target(**(fields | {"tls": mode, "tls_type": "psk" if psk else "x509"}))


def _address(given: Mapping[str, Any]) -> dict[str, Any]:
    """The fields for host, port and socket; exactly one way to say them must have been used ({} for a URI)."""
    ways = [name for name in ("uri", "server", "host", "path") if name in given]
    if len(ways) != 1 or ("uri" in given and "export" in given) or ("port" in given and ways != ["host"]):
        said = ", ".join([*ways, *(name for name in ("port", "export") if name in given)]) or "nothing"
        hint = "give one of uri, host (with port), path, server; a URI holds the export's name"
        raise OptionError(f"the address of the NBD server is unclear: given is {said}", hint=hint)
    if "uri" in given:
        return {}
    if "path" in given:
        return {"socket": given["path"]}
    server = given.get("server", {"type": "inet", "host": given.get("host"), "port": given.get("port")})
    inet = server["type"] == "inet"
    wrong = ("path", "abstract") if inet else ("host", "port")
    missing = "host" if inet else "path"
    if any(server.get(name) for name in wrong) or server.get(missing) is None:
        hint = "inet takes host and port, unix takes path and abstract"
        raise OptionError(f"server.{missing} is missing, or mixed with {' or '.join(wrong)}", hint=hint)
    if inet:
        return {"host": server["host"], "port": server.get("port") or DEFAULT_PORT}
    return {"socket": "\0" + server["path"] if server.get("abstract") else server["path"]}


def _parse_qemu(text: str, scheme: str, rest: str) -> Target:
    """`nbd:unix:PATH` and `nbd:HOST:PORT`; nothing in them is percent-encoded."""
    address, _, export = rest.partition(":exportname=")
    if scheme == "nbd" and address.startswith("unix:"):
        return Target(socket=address.removeprefix("unix:"), export=export)
    host, _, port = address.rpartition(":")
    bracketed = host.startswith("[") and host.endswith("]")
    if scheme != "nbd" or not host or not port or (":" in host and not bracketed):
        hint = "write nbd://HOST/EXPORT, nbd+unix:///EXPORT?socket=PATH, nbd:HOST:PORT or nbd:unix:PATH"
        raise OptionError(f"{shown(text)} is not the address of an NBD export", hint=hint)
    return Target(host=_ipv6(host[1:-1]) if bracketed else host, port=_port(port), export=export)


def _host_and_port(place: str) -> tuple[str, int]:
    """Host and port of an authority; an absent host is localhost, as for libnbd."""
    if place.startswith("["):
        literal, bracket, rest = place[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise OptionError(f"{shown(place)} is not an address", hint="write [IPV6] or [IPV6]:PORT")
        return _ipv6(literal.replace("%25", "%")), _port(rest[1:])
    host, _, port = place.partition(":")
    if ":" in port:
        raise OptionError(f"{shown(place)} has several colons", hint="write an IPv6 address in brackets: [::1]:10809")
    return (_text(host, "the host") or "localhost"), _port(port)


def _port(digits: str) -> int:
    if not digits:
        return DEFAULT_PORT
    if not (digits.isascii() and digits.isdigit() and len(digits) <= 5 and 1 <= int(digits) <= 65535):
        raise OptionError(f"the port is {shown(digits)}", hint="it is a number from 1 to 65535")
    return int(digits)


def _ipv6(literal: str) -> str:
    """`literal` if it is an IPv6 address, which may have a zone after `%`."""
    from socket import AF_INET6, inet_pton

    address, percent, zone = literal.partition("%")
    try:
        inet_pton(AF_INET6, address)
        good = not percent or (zone.isascii() and zone.replace("-", "").replace(".", "").replace("_", "").isalnum())
    except (OSError, ValueError):
        good = False
    if not good:
        raise OptionError(f"{shown(literal)} is not an IPv6 address", hint="brackets hold one, such as [2001:db8::1]")
    return literal


def _parameters(query: str) -> dict[str, str]:
    """The query's parameters, decoded: each known, each once."""
    found: dict[str, str] = {}
    for item in query.split("&") if query else ():
        key, equal, value = item.partition("=")
        name = _text(key, "a parameter's name")
        if name not in _PARAMETERS:
            from difflib import get_close_matches

            near = "".join(f"did you mean {word}? " for word in get_close_matches(name[:100], _PARAMETERS, 1))
            raise OptionError(f"the URI has no parameter {shown(name)}", hint=near + f"known: {', '.join(_PARAMETERS)}")
        if name in found or not equal:
            wrong = "is given twice" if name in found else "has no value"
            raise OptionError(f"the parameter {name} {wrong}", hint=f"write {name}=VALUE once")
        path = name in ("socket", "tls-certificates", "tls-psk-file")
        found[name] = os.fsdecode(_unquote(value)) if path else _text(value, name)
    return found


def _check(target: Target) -> None:
    """OptionError unless the fields of `target` are good, and agree."""
    unix = target.socket is not None
    if unix == (target.host is not None):
        raise OptionError("an NBD target has either a host or a socket", hint="give one of them")
    _check_export(target.export)
    for what, word in (("host", target.host), ("tls-hostname", target.tls_hostname), ("user name", target.username)):
        if word is not None:
            _check_word(what, word)
    if target.socket is not None:
        _check_path("socket", target.socket.removeprefix("\0"))
        if len(os.fsencode(target.socket)) > MAX_SOCKET_PATH:
            hint = "use a shorter path, or a relative one"
            raise OptionError(f"the socket's path is longer than {MAX_SOCKET_PATH} bytes", hint=hint)
    elif ":" in (target.host or ""):
        _ipv6(target.host or "")
    elif any(c in (target.host or "") for c in "/?#[]@%\\"):
        raise OptionError(f"the host is {shown(target.host)}", hint="give a name or an address")
    if not 1 <= target.port <= 65535 or (unix and target.port != DEFAULT_PORT):
        raise OptionError(f"the port is {target.port}", hint="it is a number from 1 to 65535, and goes with a host")
    if target.timeout is not None:
        parse_timeout(target.timeout)
    _check_tls(target)


def _check_tls(target: Target) -> None:
    if target.tls not in ("off", "allow", "require"):
        raise OptionError(f"tls is {shown(target.tls)}", hint="it takes one of off, allow, require")
    if target.tls_type == "anon":
        hint = "use x509 or psk"
        raise UnsupportedFeature("TLS without authentication protects from nobody who can interfere", hint=hint)
    if target.tls_type not in ("x509", "psk"):
        raise OptionError(f"tls-type is {shown(target.tls_type)}", hint="it takes x509 or psk")
    for what, path in (("tls-certificates", target.tls_certificates), ("tls-psk-file", target.tls_psk_file)):
        if path is not None:
            _check_path(what, path)
    psk = target.tls_type == "psk"
    if psk != (target.tls_psk_file is not None) or (psk and target.tls_certificates is not None):
        hint = "tls-psk-file goes with tls-type=psk, tls-certificates with tls-type=x509"
        raise OptionError("tls-type and the files for it do not agree", hint=hint)
    plain = (target.tls_hostname, target.tls_verify_peer, target.tls_certificates, target.tls_psk_file)
    if target.tls == "off" and plain != (None, True, None, None):
        raise OptionError("there are TLS parameters, but tls is off", hint="use an nbds URI, or tls=require")


def _check_export(name: str) -> None:
    try:
        size = len(name.encode())
    except UnicodeEncodeError as error:
        raise OptionError("the export name is not Unicode text", hint="export names are UTF-8") from error
    if "\0" in name or size > MAX_EXPORT_NAME:
        hint = f"it has at most {MAX_EXPORT_NAME} bytes as UTF-8, and no NUL"
        raise OptionError(f"the export name has {size} bytes, or a NUL character", hint=hint)


def _check_word(what: str, word: str) -> None:
    """A host or user name: printable, without spaces, and not like an option of a command (CVE-2025-14946)."""
    if not word or not word.isprintable() or " " in word or word.startswith("-") or len(word) > 255:
        hint = "it is 1 to 255 printable characters, without spaces, the first no dash"
        raise OptionError(f"the {what} is {shown(word)}", hint=hint)


def _check_path(what: str, path: str) -> None:
    if not _encode(path, what) or "\0" in path:
        raise OptionError(f"{what} is {shown(path)}", hint="it takes a path")


def _text(quoted: str, what: str) -> str:
    """`quoted` decoded: percent-encoded UTF-8. A plus sign is a plus sign (RFC 3986, not a web form)."""
    try:
        return _unquote(quoted).decode()
    except UnicodeDecodeError as error:
        raise OptionError(f"{what} is not UTF-8: {shown(quoted)}", hint="percent-encode UTF-8 bytes") from error


def _encode(path: str, what: str) -> bytes:
    try:
        return os.fsencode(path)
    except UnicodeEncodeError as error:
        raise OptionError(f"{what} is no text: {shown(path)}", hint="it holds half of a surrogate pair") from error


def _unquote(quoted: str) -> bytes:
    first, *parts = _encode(quoted, "the URI").split(b"%")
    found = [first]
    for part in parts:
        try:
            code = bytes([int(part[:2], 16)]) if part[:2].isalnum() and len(part) > 1 else b""
        except ValueError:
            code = b""
        if not code:
            raise OptionError(f"{shown(quoted)}: % is not followed by two hexadecimal digits", hint="write %25 for %")
        found += (code, part[2:])
    return b"".join(found)


def _quote(text: str | bytes) -> str:
    data = text.encode() if isinstance(text, str) else text
    return "".join(chr(byte) if byte in _SAFE else f"%{byte:02X}" for byte in data)
