"""NBD: disks over a network, as server and as client.

`wire` is the protocol as a table. `server` and `client` each hold the two halves of the protocol (`negotiation`,
`transmission`) as machines without I/O, and the threads that drive them over a `channel`, plain or TLS. `node` is the
storage driver `nbd`, `inspect` asks a server about its exports without entering one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client
    from .server import Export, Folder, RestrictedExport, Server

__all__ = ["Client", "Export", "Folder", "RestrictedExport", "Server"]

_HOMES = {"Client": "client", "Export": "server", "Folder": "server", "RestrictedExport": "server", "Server": "server"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "Offer":
        from warnings import warn

        warn("Offer is called RestrictedExport now", DeprecationWarning, stacklevel=2)
        name = "RestrictedExport"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)


def __dir__() -> list[str]:
    return sorted(__all__)
