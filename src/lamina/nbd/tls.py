"""TLS credentials of both roles: from folders of certificates, or pre-shared keys, to an `ssl.SSLContext`.

The folder is laid out as QEMU, nbdkit and libnbd expect it: `ca-cert.pem`, `server-cert.pem`, `server-key.pem`,
`client-cert.pem`, `client-key.pem`, and `ca-crl.pem` if certificates were revoked. TLS 1.2 or newer, no compression, no
renegotiation, no resumption. A client always checks the chain *and* the name of the server, unless it was told in so many
words not to; who may use a server is decided by `allowed`, which compares whole names.

`ssl` is imported by the functions that need it, so that programs without TLS start without it. The functions may run in
many threads; the contexts that they give may be shared by any number of connections.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Collection, Iterable, Mapping, Sequence
from errno import EACCES, ECONNRESET, EPROTO, ETIMEDOUT
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import BlockIOError, LaminaError, OptionError, UnsupportedFeature
from ..named_file import read_named
from ..options import shown
from .access_rules import AccessRules
from .uri import Target

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable

#: A file of pre-shared keys holds at most this many bytes, and a key this many (OpenSSL's own bound).
MAX_PSK_FILE = 1 << 20
MAX_PSK = 256
#: Ciphers for pre-shared keys, with TLS 1.2: authenticated ones, those with forward secrecy first (RFC 5487, 7905).
_PSK_CIPHERS = (
    "ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-AES256-GCM-SHA384:DHE-PSK-AES128-GCM-SHA256:"
    "PSK-AES256-GCM-SHA384:PSK-AES128-GCM-SHA256:PSK-CHACHA20-POLY1305"
)

# Names of the attributes that have a short one in RFC 4514, section 3, and those that OpenSSL and GnuTLS also shorten.
_SHORT = {
    "commonName": "CN",
    "localityName": "L",
    "stateOrProvinceName": "ST",
    "organizationName": "O",
    "organizationalUnitName": "OU",
    "countryName": "C",
    "streetAddress": "STREET",
    "domainComponent": "DC",
    "userId": "UID",
    "emailAddress": "EMAIL",
}
_KINDS = {"DNS": "dns", "URI": "uri", "IP Address": "ip", "email": "email"}


def server_context(
    certificates: str | os.PathLike[str] | None = None,
    *,
    verify_peer: bool = False,
    psk_file: str | os.PathLike[str] | None = None,
) -> ssl.SSLContext:
    """A server's context, from a folder of certificates or a file of pre-shared keys (one of them).

    `verify_peer`: clients must show a certificate that the folder's ca-cert.pem signed. It is off by default, as in the
    programs people know; an allow-list makes no sense without it. Pre-shared keys always authenticate the client.
    OptionError, BlockIOError (a file that is missing or unreadable), UnsupportedFeature (no such keys in this Python).
    """
    import ssl

    if (certificates is None) == (psk_file is None):
        raise OptionError("a TLS server has certificates or pre-shared keys", hint="give one: a folder, or a psk file")
    context = _hardened(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER))
    if psk_file is not None:
        return _psk_server(context, Path(psk_file))
    folder = _folder(certificates)
    _load_identity(context, folder, "server", required=True)
    if verify_peer:
        _load_authority(context, folder)
        context.verify_mode = ssl.CERT_REQUIRED
    return context


def client_context(target: Target) -> tuple[ssl.SSLContext, str | None]:
    """The context for a connection to `target`, and the name that the server's certificate must have.

    The name is None only where nothing is verified by name: with `tls_verify_peer` off, or a pre-shared key. Without a
    folder the authorities that this system trusts count. Errors as `server_context`; and OptionError for a Unix socket
    without `tls_hostname`, since a certificate that could be anybody's proves nothing (CVE-2024-7383).
    """
    import ssl

    context = _hardened(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT))
    if target.tls_psk_file is not None:
        return _psk_client(context, Path(target.tls_psk_file), target.username), None
    name = target.tls_hostname or target.host
    if target.tls_verify_peer and name is None:
        hint = "add tls-hostname=NAME, the name in the server's certificate"
        raise OptionError("TLS over a Unix socket cannot tell which name to expect", path=target.place, hint=hint)
    folder = None if target.tls_certificates is None else _folder(target.tls_certificates)
    if folder is not None:
        _load_identity(context, folder, "client", required=False)
    if not target.tls_verify_peer:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context, None
    if folder is not None:
        _load_authority(context, folder)
    else:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    return context, name.partition("%")[0] if name and ":" in name else name


def allowed(names: Sequence[str], allow: Collection[str] | AccessRules | None) -> bool:
    """Whether one of a peer's verified `names` is in the list `allow`, or rules admit them; None allows everybody, and
    an empty list nobody.

    Names of a list are compared whole: no prefixes, patterns or suffixes (CVE-2013-6410). Servers ask twice: with
    their own list after the handshake, and with that of the export before it is opened.
    """
    if isinstance(allow, AccessRules):
        return allow.admits(names)
    return allow is None or any(name in allow for name in names)


def allow_list(entries: Iterable[str]) -> frozenset[str]:
    """`entries` as `peer_names` spells them, for `allowed`; OptionError for one that no certificate can have.

    An entry is a subject as RFC 4514 writes it (`CN=backup,O=Example,C=DE`: last part first, no spaces after commas),
    or a subject alternative name with its kind: `dns:host.example`, `uri:...`, `ip:...`, `email:...`.
    """
    found = set()
    for entry in entries:
        kind, colon, value = entry.partition(":")
        if colon and kind.lower() in _KINDS.values():
            found.add(_alternative(kind.lower(), value))
        elif "=" in entry and kind.partition("=")[0].replace(".", "").replace("-", "").isalnum():
            if ", " in entry.replace("\\\\", "").replace("\\,", ""):
                raise OptionError(f"{shown(entry)} has spaces after its commas", hint="write CN=name,O=organisation")
            found.add(entry)
        else:
            hint = "write CN=name,O=organisation, or dns:NAME, uri:NAME, ip:ADDRESS, email:ADDRESS"
            raise OptionError(f"{shown(entry)} is not a name that a certificate can have", hint=hint)
    return frozenset(found)


def peer_names(certificate: Mapping[str, Any] | None) -> tuple[str, ...]:
    """The names in a verified certificate (`getpeercert()`): the subject as RFC 4514 text, then alternative names.

    Alternative names have their kind in front (`dns:`, `uri:`, `ip:`, `email:`), so that one kind cannot pass for another.
    """
    if not certificate:
        return ()
    parts = certificate.get("subject", ())
    subject = ",".join(
        "+".join(f"{_SHORT.get(kind, kind)}={_escaped(value)}" for kind, value in part) for part in reversed(parts)
    )
    others = certificate.get("subjectAltName", ())
    names = [_alternative(_KINDS[kind], value) for kind, value in others if kind in _KINDS]
    return tuple(([subject] if subject else []) + names)


def failure(error: Exception, *, peer: str, server_side: bool, hostname: str | None = None) -> LaminaError:
    """The Lamina error that stands for an error of `ssl` on the connection with `peer` (keep it as the cause).

    A BlockIOError: EACCES where one side does not trust the other, EPROTO for the rest.
    """
    reason = (getattr(error, "reason", None) or "").upper()
    code = getattr(error, "verify_code", None)
    other = "client" if server_side else "server"
    number, hint = EACCES, None
    if code is not None:
        message, hint = _untrusted(code, getattr(error, "verify_message", ""), other, hostname)
    elif "PEER_DID_NOT_RETURN_A_CERTIFICATE" in reason:
        message, hint = "the client showed no certificate", "it needs client-cert.pem and client-key.pem"
    elif "ALERT_CERTIFICATE_REQUIRED" in reason or (not server_side and "ALERT_HANDSHAKE_FAILURE" in reason):
        message = "the server refused the TLS connection: it may ask for a client certificate"
        hint = "put client-cert.pem and client-key.pem into the folder of tls-certificates"
    elif "ALERT_UNKNOWN_CA" in reason or ("CERTIFICATE" in reason and "ALERT" in reason):
        message = f"the {other} does not accept our certificate ({_words(reason)})"
        hint = "check that an authority it trusts signed it, and its dates" if server_side else None
        hint = hint or "ask its operator which authority signs client certificates"
    elif any(word in reason for word in ("DECRYPT_ERROR", "PSK", "BAD_RECORD_MAC", "DECRYPTION_FAILED")):
        message, hint = "the keys of both sides differ", "check the user name and the key in the psk file"
    elif any(word in reason for word in ("PROTOCOL_VERSION", "UNSUPPORTED_PROTOCOL", "NO_SHARED_CIPHER")):
        number, message = EPROTO, f"both sides have no version of TLS, or no cipher, in common ({_words(reason)})"
        hint = f"TLS 1.2 is the oldest that is spoken here; see what the {other} has"
    else:
        number, message = EPROTO, f"TLS failed: {_words(reason) or str(error)}"
        hint = "the other side may not speak TLS here" if "WRONG_VERSION" in reason else None
    return BlockIOError(message, errno=number, path=peer, hint=hint)


def truncated(peer: str) -> LaminaError:
    """The error for a stream that ended without TLS's own farewell: somebody may have cut it."""
    hint = "the other side crashed, or somebody between cut the connection"
    return BlockIOError("the TLS stream ended without being closed", errno=ECONNRESET, path=peer, hint=hint)


def late(peer: str, seconds: float) -> LaminaError:
    """The error for a handshake that took longer than its `seconds`."""
    return BlockIOError(f"no TLS handshake within {seconds:g} s", errno=ETIMEDOUT, path=peer)


def _untrusted(code: int, text: str, other: str, hostname: str | None) -> tuple[str, str | None]:
    """Message and hint for a result of OpenSSL's verification (the X509_V_ERR numbers of its documentation)."""
    prefix = f"the {other}'s certificate "
    if code in (9, 10):
        past = "has expired" if code == 10 else "is not valid yet"
        return prefix + past, "renew it, or set the clock of this machine"
    if code in (62, 64):
        return prefix + f"is not for {shown(hostname)}", "use its name in the URI, or say it with tls-hostname"
    if code in (2, 18, 19, 20, 21):
        return prefix + f"was not signed by an authority that we trust ({text})", "check ca-cert.pem"
    if code == 23:
        return prefix + "was revoked", None
    return prefix + f"is not good: {text}", None


def _words(reason: str) -> str:
    return reason.replace("_", " ").lower()


def _hardened(context: ssl.SSLContext) -> ssl.SSLContext:
    import ssl

    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.options |= ssl.OP_NO_COMPRESSION | ssl.OP_NO_RENEGOTIATION | ssl.OP_NO_TICKET
    # Python tells OpenSSL to take a cut stream for an ended one; TlsChannel sees to that itself, but others may not.
    context.options &= ~ssl.OP_IGNORE_UNEXPECTED_EOF
    if context.protocol == ssl.PROTOCOL_TLS_SERVER:
        context.num_tickets = 0  # a resumed session would outlive a revoked certificate
    return context


def _folder(path: str | os.PathLike[str] | None) -> Path:
    folder = Path(path or "")
    if not os.path.isdir(folder):  # (that of `Path` raises for a name that is too long)
        hint = "name the folder that holds ca-cert.pem and the keys"
        raise OptionError("the folder of certificates does not exist", path=str(folder), hint=hint)
    return folder


def _load_authority(context: ssl.SSLContext, folder: Path) -> None:
    import ssl

    authority, revoked = folder / "ca-cert.pem", folder / "ca-crl.pem"
    _readable(authority)
    _loading(authority, lambda: context.load_verify_locations(authority))
    if revoked.exists():
        _readable(revoked)
        _loading(revoked, lambda: context.load_verify_locations(revoked))
        context.verify_flags |= ssl.VERIFY_CRL_CHECK_LEAF


def _load_identity(context: ssl.SSLContext, folder: Path, role: str, *, required: bool) -> None:
    certificate, key = folder / f"{role}-cert.pem", folder / f"{role}-key.pem"
    if not required and not os.path.exists(certificate) and not os.path.exists(key):
        return
    _readable(certificate)
    # A group may read it (servers run in groups made for that); strangers may not.
    _readable(key, secret_from=0o007)

    def no_password() -> str:
        hint = "take the passphrase off: openssl pkey -in KEY -out KEY"
        raise UnsupportedFeature("the private key has a passphrase", path=str(key), hint=hint)

    _loading(certificate, lambda: context.load_cert_chain(certificate, key, no_password))


def _loading(path: Path, load: Callable[[], None]) -> None:
    import ssl

    try:
        load()
    except ssl.SSLError as error:
        mismatch = "MISMATCH" in (error.reason or "")
        what = "the certificate and its key do not belong together" if mismatch else "this is not what OpenSSL can read"
        raise OptionError(
            f"{what} ({_words(error.reason or str(error))})", path=str(path), hint="PEM is read"
        ) from error
    except OSError as error:
        raise BlockIOError.from_os(error, "cannot read it", path=str(path)) from error


def _readable(path: Path, *, secret_from: int = 0, fifo: bool = False) -> bytes:
    """What is in the file; refused if one of the permissions `secret_from` is given to others. `fifo`: it may be a FIFO;
    what OpenSSL opens again by its name may not."""
    if not fifo:
        with contextlib.suppress(OSError):  # it is told below
            if not stat.S_ISREG(os.stat(path).st_mode):
                raise OptionError("it is no regular file", path=str(path), hint="put the PEM file itself there")
    data, status = read_named(str(path), MAX_PSK_FILE + 1, failure="TLS needs this file")
    if status.st_mode & secret_from:
        hint = f"take the permission away: chmod {status.st_mode & 0o777 & ~secret_from & ~0o077:o} {path}"
        raise OptionError("others can read or change this secret", path=str(path), hint=hint)
    if len(data) > MAX_PSK_FILE:
        raise OptionError("the file is too long for what it should be", path=str(path), hint="is it the right one?")
    return data


def _alternative(kind: str, value: str) -> str:
    if kind == "ip":
        import ipaddress

        try:
            value = str(ipaddress.ip_address(value.strip()))
        except ValueError as error:
            raise OptionError(f"{shown(value)} is not an IP address", hint="write ip:192.0.2.1") from error
    return f"{kind}:{value.lower() if kind == 'dns' else value}"


def _escaped(value: str) -> str:
    """An attribute's value as RFC 4514, section 2.4, writes it: no two values look the same."""
    text = "".join("\\" + c if c in '"+,;<>\\' else "\\00" if c == "\0" else c for c in value)
    if text[:1] in ("#", " "):
        text = "\\" + text
    return text[:-1] + "\\ " if len(value) > 1 and value.endswith(" ") else text


def read_psk_file(path: Path) -> dict[str, bytes]:
    """The keys by user name in a file of lines `USER:HEXKEY`; blank lines and those that begin with # do not count."""
    keys: dict[str, bytes] = {}
    for number, line in enumerate(_readable(path, secret_from=0o077, fifo=True).splitlines(), 1):
        if not line.strip() or line.startswith(b"#"):
            continue
        user, _, digits = line.rpartition(b":")
        try:
            name, key = user.decode(), bytes.fromhex(digits.decode())
        except ValueError:
            name, key = "", b""
        if not name or name in keys or not 8 <= len(key) <= MAX_PSK:
            # Not the line itself, nor the error that came of it: both hold the secret.
            hint = f"write USER:HEXKEY, each user once, keys of 8 to {MAX_PSK} bytes (psktool makes them)"
            raise OptionError(f"line {number} is not a user with a key", path=str(path), hint=hint) from None

        keys[name] = key
    return keys


def _psk_server(context: ssl.SSLContext, path: Path) -> ssl.SSLContext:
    keys = read_psk_file(path)
    set_callback = _psk_setter(context, "set_psk_server_callback")
    set_callback(psk_chooser(keys))
    return context


def psk_chooser(keys: Mapping[str, bytes]) -> Callable[[str | None], bytes]:
    """What a server answers for a user name. An unknown user has a key too, one that nobody knows: the handshake then
    takes the same steps and fails with the same alert as with a wrong key (RFC 4279, section 2)."""
    import hashlib
    import hmac

    secret = os.urandom(32)
    known = {name.encode(): key for name, key in keys.items()}

    def choose(identity: str | None) -> bytes:
        user = (identity or "").encode(errors="surrogateescape")
        nobody = hmac.digest(secret, user, hashlib.sha256)  # worked out for known users too: the same time
        return known.get(user, nobody)

    return choose


def _psk_client(context: ssl.SSLContext, path: Path, username: str | None) -> ssl.SSLContext:
    import getpass
    import ssl

    keys = read_psk_file(path)
    user = getpass.getuser() if username is None else username
    if user not in keys:
        hint = "name the user in the URI: nbds://USER@HOST/, or add a line USER:HEXKEY"
        raise OptionError(f"there is no key for the user {shown(user)}", path=str(path), hint=hint)
    key = keys[user]
    context.check_hostname = False
    context.verify_mode = ssl.CERT_NONE  # the key proves who the server is: there is no certificate
    set_callback = _psk_setter(context, "set_psk_client_callback")
    set_callback(lambda hint: (user, key))
    return context


def _psk_setter(context: ssl.SSLContext, method: str) -> Callable[..., None]:
    """The method that sets the callback for keys, of a context that speaks only TLS 1.2 with ciphers for them."""
    import ssl

    setter: Callable[..., None] | None = getattr(context, method, None)
    if setter is None or not getattr(ssl, "HAS_PSK", False):
        hint = "use Python 3.13 or newer with OpenSSL, or certificates"
        raise UnsupportedFeature("this Python has no TLS with pre-shared keys", hint=hint)
    # OpenSSL and GnuTLS disagree about such keys in TLS 1.3 (which hash goes with them); 1.2 is the same for both.
    context.maximum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_PSK_CIPHERS)
    return setter
