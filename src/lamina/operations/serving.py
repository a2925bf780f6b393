"""`lamina.serve` and `lamina.connect`: a disk over NBD, from either side."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from ..errors import OptionError, printable
from ..limits import DEFAULT_BUDGET, Budget
from ..options import size_of
from ..parameters import checked
from ..policy import Policy
from .sources import Source, opened

if TYPE_CHECKING:
    from ..nbd.client import Client
    from ..nbd.server import Server
    from ..nbd.uri import Target


@checked
def serve(
    source: Source,
    *,
    socket: str | os.PathLike[str] | None = None,
    host: str | None = None,
    port: int | None = None,
    name: str = "",
    description: str = "",
    writable: bool = False,
    format: str | None = None,
    source_snapshot: str | None = None,
    bitmaps: Sequence[str] = (),
    write_through: bool = False,
    tls: Literal["off", "allow", "require"] | None = None,
    tls_certificates: str | os.PathLike[str] | None = None,
    tls_psk_file: str | os.PathLike[str] | None = None,
    tls_verify_peer: bool = False,
    tls_allow: Sequence[str] = (),
    insecure: bool = False,
    clients: int = 100,
    handshake_time: float = 10.0,
    idle_time: float | None = None,
    stall_time: float | None = 60.0,
    memory_limit: int | str | None = None,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
) -> Server:
    """Serve an image as an NBD export, in threads, until the server is closed. It serves already when this returns:

        with lamina.serve("disk.qcow2", format="qcow2") as server:
            print(server.uri)

    `source` is a path, a name or nested options as for `lamina.open`, opened with `format`, `references`, `budget` and
    `force_share`, where `source_snapshot` is the id or name of an internal snapshot; or an open image, which the caller may
    use meanwhile, and close before the server or after it. `socket`: the path of a Unix socket, made with mode 0600 and
    removed at the end. `host`, `port`: TCP; without any of the three on the loopback interface, at any free port.
    `Server.uri` names what was chosen.

    `name` and `description` are those of the export. `writable`: clients may write; an open image must be writable then.
    `bitmaps`: names of dirty bitmaps that clients may query. `write_through`: each write is on stable storage before its
    reply. `tls_certificates`: a folder with server-cert.pem, server-key.pem and ca-cert.pem, or `tls_psk_file`: a file
    with USER:HEX in each line; with either, TLS is required, unless `tls` is "allow". `tls_verify_peer`: clients need a
    certificate that ca-cert.pem signed; `tls_allow`: with one of these names. A `host` that others can reach needs TLS or
    `insecure`. `clients`, the times (seconds) and `memory_limit` (bytes) as for `lamina.nbd.Server`, which serves several
    exports as well.

    Raises OptionError, ReadOnly, BlockIOError, and the errors of opening.
    """
    from ..nbd.server import Export, RestrictedExport, Server
    from ..nbd.wire import PORT

    mode, context = _tls(tls, tls_certificates, tls_psk_file, tls_verify_peer, tls_allow)
    if port is None and socket is None:
        port = 0 if host is None else PORT
    how: dict[str, Any] = {"references": references, "budget": budget, "force_share": force_share}
    with opened(source, format, read_only=not writable, snapshot=source_snapshot, **how) as image:
        if writable:
            image.root.edge.require_writable("serve")
        for each in bitmaps:
            if each not in image.bitmaps:
                hint = f"it has {', '.join(image.bitmaps)}" if image.bitmaps else "it has none"
                raise OptionError(f"the image has no bitmap {printable(each)}", path=image.filename, hint=hint)
        export = Export(
            image,
            name,
            description=description,
            writable=writable,
            bitmaps={each: image.bitmaps[each] for each in bitmaps},
            write_through=write_through,
        )
        allow = None
        if tls_allow:
            from ..nbd.tls import allow_list

            allow = allow_list(tls_allow)
        server = Server(
            [RestrictedExport(export)],
            unix=None if socket is None else os.fspath(socket),
            host=host,
            port=port,
            tls=mode,
            context=context,
            allow=allow,
            insecure=insecure,
            clients=clients,
            handshake_time=handshake_time,
            idle_time=idle_time,
            stall_time=stall_time,
            memory_limit=None if memory_limit is None else size_of(memory_limit, "memory_limit"),
        )
        try:
            return server.start()  # with a root of its own on the image
        except BaseException:
            server.close()
            raise


def _tls(
    mode: str | None,
    certificates: str | os.PathLike[str] | None,
    psk_file: str | os.PathLike[str] | None,
    verify_peer: bool,
    allow: Sequence[str],
) -> tuple[str, Any]:
    """The mode and the context of a server."""
    credentials = certificates is not None or psk_file is not None
    mode = mode or ("require" if credentials else "off")
    if (mode == "off") == credentials:
        raise OptionError(
            "the TLS mode contradicts the credentials: with certificates or keys TLS is on, without them it is off",
            hint="give tls_certificates or tls_psk_file, or neither and no tls",
        )
    if verify_peer and certificates is None:
        raise OptionError("clients cannot be verified without certificates", hint="give tls_certificates")
    if allow and not verify_peer:
        raise OptionError("a list of names requires verified certificates", hint="add tls_verify_peer=True")
    if mode == "allow" and psk_file is not None:
        raise OptionError("clients without a key could connect without TLS", hint="require TLS: omit tls")
    if mode == "off":
        return mode, None
    from ..nbd.tls import server_context

    return mode, server_context(certificates, verify_peer=verify_peer, psk_file=psk_file)


@checked
def connect(
    uri: str | Target,
    *,
    contexts: Sequence[str] = ("base:allocation",),
    connections: int = 1,
    open_timeout: float = 0.0,
    connect_timeout: float | None = None,
    handshake_timeout: float | None = None,
    request_timeout: float | None = None,
    reconnect: float = 0.0,
) -> Client:
    """A client of the export that the NBD URI `uri` names (`nbd://host/name`, `nbds://...`,
    `nbd+unix:///name?socket=PATH`), for its requests themselves; it is a context manager. `lamina.open(uri,
    format="raw")` gives an export as an image.

    `contexts`: metadata contexts that `Client.block_status` will ask for. `connections`: that many, where the server says
    that several are coherent. Times are seconds: `open_timeout`, how long to try to connect while nobody listens;
    `connect_timeout` and `handshake_timeout`, how long these may take; `request_timeout`, how long the server may make no
    progress with a request before the connection counts as lost (None: 60, and 600 while it flushes, trims or zeroes; 0:
    for ever); `reconnect`, how long a request waits for a lost connection to come back (0: the loss is an error).

    Raises any LaminaError: NotFound where there is no such export or socket.
    """
    from ..nbd.client import Client

    return Client.connect(
        uri,
        contexts=contexts,
        connections=connections,
        open_timeout=open_timeout,
        connect_timeout=connect_timeout,
        handshake_timeout=handshake_timeout,
        request_timeout=request_timeout,
        reconnect=reconnect,
    )
