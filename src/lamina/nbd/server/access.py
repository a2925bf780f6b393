"""Checks of the options for TLS and access: no option may make another one ineffective."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import TYPE_CHECKING

from ...errors import Hint, OptionError

if TYPE_CHECKING:
    import ssl

    from ..access_rules import AccessRules
    from .exports import RestrictedExport

_VERIFY = Hint(
    "verify the certificates of clients: server_context(..., verify_peer=True)",
    command="verify the certificates of clients (--tls-verify-peer)",
)


def check_access(
    tls: str,
    context: ssl.SSLContext | None,
    allow: Collection[str] | AccessRules | None,
    restricted: Iterable[RestrictedExport],
    *,
    folder: bool,
) -> None:
    """Raise OptionError for a combination that admits clients which one of the options excludes. `folder`: there is also a
    folder of exports, which all clients see."""
    if tls not in ("off", "allow", "require") or (tls == "off") != (context is None):
        raise OptionError("TLS is off, or needs a context", hint='tls="allow" or "require", with context')
    restricted = list(restricted)
    listed = allow is not None or any(each.allow is not None for each in restricted)
    guarded = any(each.tls_only or each.allow is not None for each in restricted)
    if context is None:
        if allow is not None:
            raise OptionError("a list of names needs certificates to read them from", hint=_VERIFY)
        return  # without TLS no client sees the restricted exports
    verifies = int(context.verify_mode) == 2  # ssl.CERT_REQUIRED: a client without a certificate does not come in
    if listed and not verifies:
        raise OptionError("a list of names needs certificates to read them from", hint=_VERIFY)
    if tls == "allow" and allow is not None:
        raise OptionError(
            "the list of names would keep nobody out who comes without TLS",
            hint=Hint('require TLS: tls="require"', command="require TLS (--tls require)"),
        )
    if tls == "allow" and verifies and (folder or not guarded):
        raise OptionError(
            "clients are verified, and would be let in without TLS, too",
            hint=Hint(
                'require TLS: tls="require"; or RestrictedExport(..., tls_only=True) for each export that matters',
                command="require TLS (--tls require), or say of each export that matters tls-only=on",
            ),
        )
