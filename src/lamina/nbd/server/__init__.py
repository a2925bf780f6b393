"""The server: `Server` accepts clients, a `connection` serves each of them, `export` shows an image as NBD sees it.

`negotiation` and `transmission` are the two halves of the protocol as machines without I/O.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import Export
    from .exports import Folder, Offer
    from .server import Server

__all__ = ["Export", "Folder", "Offer", "Server"]

_HOMES = {"Export": "export", "Folder": "exports", "Offer": "exports", "Server": "server"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
