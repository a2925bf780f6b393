"""The server: `Server` accepts clients, a `connection` serves each of them, `export` shows an image as NBD sees it.

`negotiation` and `transmission` are the two halves of the protocol as machines without I/O.

Which thread executes a request
===============================

The thread of the connection, or a thread of the pool:

1. *The thread of the connection* (`connection.py`) receives, executes (`commands.py`) and answers. One receive brings many
   requests and one send takes many replies, so a request costs microseconds. This is the path while the storage is fast,
   which is judged by what reads and writes of the export took of late (`pool.StoragePool`: up to 1 ms on average).

   Several clients that are busy at once would meet at every system call, where the interpreter passes from one thread to the
   other. While they do, and what they send are short READs and WRITEs, one thread does for all of them what their own threads
   would do (`loop.py`). Gain: 5 us for a 4 KiB read of four clients in place of 7, on an idle machine.

2. *The pool*: while the storage is slow, waiting for one request would hold up the others. Each request is then executed by
   one of 32 threads of the export, and answered when it is done. Gain: of 16 reads in flight from storage that takes 2 ms,
   4,300 a second in place of 350.

   No thread of the pool waits for a client: each connection has a thread that sends for the pool. A WRITE_ZEROES or TRIM of
   more than `commands.STEP` bytes gets a thread of its own: two clients could keep the whole pool busy with such requests
   for hours. Between the steps it ends if its client is gone, or the server wants to end.

BLOCK_STATUS is judged by itself, for each client alone (`Connection.status_speed`): the thread of the connection executes it,
or the pool where it is slow (the storage is another server, say). The time that it takes says nothing of how fast the storage
reads, and delays nobody's turn, so no client changes the path of another client's requests by asking. A question that a few
extents answer takes 9 us of the server's time, in place of 250 with columns; 3 us where the client asks for one extent after
the other, of an export that no request can change: the thread of the connection reads ahead (`readahead.py`).
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
