"""A server to be attacked, and what a client says to it that uses everything."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import lamina
from lamina.limits import GIB, MIB
from lamina.nbd import Export, Server
from lamina.nbd import wire as w

from ..nbd_memory import MemoryServer
from ..nbd_raw import CLIENT_FLAGS, PATIENCE, Raw, SocketStream, await_server, dial, info, meta, option_bytes

SIZE = 8 * GIB


@contextmanager
def victim(folder: Path) -> Iterator[Path]:
    """The socket of a server with the exports "disk", 8 GiB that may be written, and "other"."""
    path = folder / "socket"
    with (
        lamina.open({"driver": "memory", "size": SIZE}, read_only=False) as image,
        lamina.open({"driver": "memory", "size": MIB}, read_only=False) as other,
        # A negotiation may take longer than the patience of the clients: whoever is made to wait for one fails.
        Server(
            [Export(image, "disk", writable=True), Export(other, "other")], unix=str(path), handshake_time=10 * PATIENCE
        ),
    ):
        other.write(0, b"served")
        await_server(path)
        yield path


def served(path: Path, mode: str = "structured") -> None:
    """A client that behaves gets what it wants, and waits for no other one."""
    with dial(path) as raw:
        raw.begin("other", mode)
        assert raw.read(0, 6) == b"served"
        raw.disc()
        assert raw.ended()


def rest(raw: Raw) -> bytes:
    assert isinstance(raw.stream, SocketStream)
    return raw.stream.rest()


def finish(raw: Raw) -> bytes:
    """No more is said; what does the server answer?"""
    assert isinstance(raw.stream, SocketStream)
    raw.stream.finish()
    return raw.stream.rest()


def conversation(mode: str) -> bytes:
    """All that a client says that uses everything, from its flags to DISC."""
    raw = Raw(MemoryServer([]))
    raw.extended = mode == "extended"
    agree = {"extended": [w.OPT_EXTENDED_HEADERS], "structured": [w.OPT_STRUCTURED_REPLY], "simple": []}[mode]
    said = [
        w.CLIENT_FLAGS.pack(flags=CLIENT_FLAGS),
        option_bytes(w.OPT_LIST),
        *(option_bytes(option) for option in agree),
        option_bytes(w.OPT_LIST_META_CONTEXT, meta("disk")),
        option_bytes(w.OPT_SET_META_CONTEXT, meta("disk", "base:allocation")),
        option_bytes(w.OPT_INFO, info("disk", 0, 1, 2, 3)),
        option_bytes(99, b"data"),
        option_bytes(w.OPT_GO, info("disk", 3)),
        raw.request(w.CMD_READ, 0, 4096, send=False),
        raw.write_bytes(4096, b"payload" * 10),
        raw.request(w.CMD_BLOCK_STATUS, 0, MIB, send=False),
        raw.request(w.CMD_WRITE_ZEROES, 8192, 512, send=False),
        raw.request(w.CMD_FLUSH, send=False),
        raw.request(w.CMD_READ, SIZE, 1, send=False),
        raw.request(w.CMD_DISC, send=False),
    ]
    return b"".join(said)
