"""NBD: disks over a network, as server and as client.

`wire` is the protocol as a table. The sessions (`server_negotiation`, `server_session`, `client_*`) are machines without
I/O; `server_connection` and `client` drive them in threads over a `channel`, plain or TLS. `export` shows an image as
NBD sees it, `exports` what a server has to offer, `node` is the storage driver `nbd`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .client import Client
    from .export import Export
    from .exports import Folder, Offer
    from .server import Server

__all__ = ["Client", "Export", "Folder", "Offer", "Server"]

_HOMES = {"Client": "client", "Export": "export", "Folder": "exports", "Offer": "exports", "Server": "server"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
