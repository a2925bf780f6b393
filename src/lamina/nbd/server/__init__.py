"""The server: `Server` accepts clients, a `connection` serves each of them, and `export` presents an image as an NBD export.

`negotiation` and `transmission` implement the two phases of the protocol, without I/O.

The thread that executes a request
==================================

1. *The thread of the connection* (`connection.py`) receives requests, executes them (`commands.py`) and sends replies. One
   receive returns many requests, and one send takes many replies, so a request takes microseconds. This path is used while
   the storage is fast: its reads and writes take at most 1 ms on average (`pool.StoragePool`).

   The threads of several busy clients would compete for the interpreter at every system call. While their requests are short
   READs and WRITEs, one thread serves all these clients (`loop.py`). Gain: a 4 KiB read of four clients takes 5 us instead of
   7, on an idle machine.

2. *A thread of the pool* executes each request while the storage is slow, so that requests do not wait for one another; the
   reply is sent when the request is done. An export has up to 32 such threads. Gain: with 16 reads in flight to storage that
   takes 2 ms, 4,300 per second instead of 350.

   No thread of the pool waits for a client: each connection has a thread that sends replies of the pool. A WRITE_ZEROES or
   TRIM of more than `commands.STEP` bytes gets a thread of its own, since two clients could otherwise occupy the whole pool
   with such requests for hours. Between two steps it ends if the client has disconnected, or the server ends.

BLOCK_STATUS has a speed of its own for each client (`Connection.status_speed`): the thread of the connection executes it, or
the pool if it is slow (the storage may be another server). Its duration says nothing about the speed of reads, so a client
that queries status does not change the path of other clients' requests. A query that a few extents answer takes 9 us of the
server's time, instead of 250 with columns; it takes 3 us if the client queries one extent after the other, of an export that
no request can change: then the thread of the connection reads ahead (`readahead.py`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .export import Export
    from .exports import Folder, RestrictedExport
    from .server import Server

__all__ = ["Export", "Folder", "RestrictedExport", "Server"]

_HOMES = {"Export": "export", "Folder": "exports", "RestrictedExport": "exports", "Server": "server"}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    if name == "Offer":
        from warnings import warn

        warn("Offer is called RestrictedExport now", DeprecationWarning, stacklevel=2)
        name = "RestrictedExport"
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_HOMES[name]}", __name__), name)
