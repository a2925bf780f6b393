"""`lamina serve`: serve images as NBD exports."""

from __future__ import annotations

import json
import logging
import math
import os
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from ..errors import OptionError, printable
from ..node import MAY_UNMAP, Node, StorageNode
from ..options import format_size, parse_keyval, parse_size
from ..side_file import SideFile
from . import program
from .arguments import Parser, image_source
from .daemon import PidFile, fork_to_background, inherited_sockets
from .ending import Ending
from .io.target import AIO_MODES, CACHE_MODES, DISCARD_MODES, Target, choose
from .serve_folder import folder_of
from .socket_label import new_sockets_labelled

if TYPE_CHECKING:
    import ssl

    from ..image import Image
    from ..nbd.access_rules import AccessRules
    from ..nbd.server import Server
    from ..nbd.server.exports import Folder, RestrictedExport

_EXAMPLES = """
  lamina serve -k disk.sock disk.qcow2                       read-only, on a Unix socket; ends with the last client
  lamina serve -t -w -k disk.sock -f raw disk.raw            writable, until it is stopped
  lamina serve -t -p 10809 -x web -D "web server" web.qcow2  TCP on localhost, under a name
  lamina serve -t -k s.sock --export name=a,file=a.qcow2 --export name=b,file=b.raw,format=raw,writable=on
  lamina serve -t -k s.sock --folder images                  every image in a folder, by its name
  lamina serve -t -p 10809 -b 0.0.0.0 --tls-certificates /etc/pki/nbd --tls-verify-peer disk.qcow2

The server prints one line when it is ready; --output json prints it for programs, with the URI.
"""

#: The longest time limit: ten years.
_MOST_SECONDS = 10 * 365 * 86400

#: The words for on and off in `--export`.
_SWITCHES = {"on": True, "true": True, "yes": True, "off": False, "false": False, "no": False}


def main(argv: list[str]) -> int:
    parser = _parser()
    args = parser.parse(argv)
    if not (args.filenames or args.export or args.folder):
        raise OptionError("no image is given", hint="lamina serve -k SOCKET disk.qcow2")
    _agree(args)
    _log(args.verbose)
    # --fork comes first: sockets and images belong to the process that opens them.
    sockets = inherited_sockets()
    ready = fork_to_background() if args.fork else None
    with ExitStack() as closing:
        for sock in sockets:
            closing.callback(sock.close)
        ending = closing.enter_context(Ending())
        restricted = _restricted(args, closing)
        stats = (
            closing.enter_context(SideFile(args.stats, append=True, failure="the counters cannot be written"))
            if args.stats
            else None
        )
        if stats is not None and any(stats.identity in _files(each.export.image.node) for each in restricted):
            raise OptionError("the counters would overwrite a served image", path=args.stats)
        folder = folder_of(args, writable=_writable(args, {}))
        mode, context, allow = _tls(args, restricted)
        ending.start()
        server = _server(args, restricted, folder, mode, context, allow, sockets)
        closing.callback(server.close)
        ending.at_once.append(server.unlink)
        if args.pid_file:
            pid_file = closing.enter_context(PidFile(args.pid_file))
            ending.at_once.append(pid_file.remove)
        server.start()
        _announce(args, server, restricted, folder)
        if ready is not None:
            ready()
        server.wait(last_client=not args.persistent, stop=ending.stop)
        server.close()
        if stats is not None:
            stats.empty()
            stats.write(json.dumps(server.stats(), indent=4) + "\n")
    return 0


def _parser() -> Parser:
    parser = Parser("serve", "Serve images over NBD, read-only by default.", _EXAMPLES)
    where = parser.add_argument_group("where")
    where.add_argument("-k", "--socket", metavar="PATH", help="a Unix socket, created with mode 0600")
    where.add_argument("-p", "--port", type=_port, help="a TCP port (default: 10809; 0: any free one)")
    where.add_argument("-b", "--bind", metavar="ADDRESS", help="the address to listen on (default: localhost)")
    where.add_argument("--selinux-label", metavar="LABEL", help="the label of the Unix socket, where SELinux is in use")
    where.add_argument("--insecure", action="store_true", help="accept clients of other hosts without TLS")
    what = parser.add_argument_group("what")
    parser.add_format("-f", "--format", dest="format", help="format of the images (default: detected)")
    what.add_argument(
        "-x", "--export-name", metavar="NAME", help="name of the export (default: empty; of several: the file names)"
    )
    what.add_argument("-D", "--description", default="", help="a description of the export, for people")
    what.add_argument("-w", "--writable", action="store_true", help="clients may write")
    what.add_argument("-r", "--read-only", action="store_true", help="clients may not write (the default)")
    what.add_argument(
        "-s", "--snapshot", action="store_true", help="clients may write; changes are discarded at the end"
    )
    what.add_argument(
        "-l", "--load-snapshot", metavar="SNAPSHOT", help="serve an internal snapshot: its id or name (read-only)"
    )
    what.add_argument("-o", "--offset", type=parse_size, default=0, metavar="OFFSET", help="first byte of the export")
    what.add_argument("--size", type=parse_size, help="length of the export (default: up to the end)")
    what.add_argument("--partition", type=int, metavar="N", help="serve only this partition")
    what.add_argument(
        "-B", "--bitmap", action="append", default=[], metavar="NAME", help="export this dirty bitmap; may be repeated"
    )
    what.add_argument(
        "-A", "--allocation-depth", action="store_true", help="accepted for compatibility; the context always exists"
    )
    what.add_argument(
        "--export",
        action="append",
        default=[],
        metavar="OPTIONS",
        help="an export (repeatable): name=,file=,format=,description=,writable=,offset=,size=,partition=,tls-only=,allow=",
    )
    what.add_argument("--folder", metavar="DIR", help="serve every file in DIR as an export")
    how = parser.add_argument_group("how")
    how.add_argument("-t", "--persistent", action="store_true", help="continue after the last client disconnects")
    how.add_argument("-e", "--shared", type=int, default=100, metavar="N", help="concurrent clients (default: 100)")
    how.add_argument("--fork", action="store_true", help="continue in the background when the server is ready")
    how.add_argument("--pid-file", metavar="PATH", help="write the process id to this file while the server runs")
    how.add_argument(
        "--cache",
        default="writeback",
        metavar="MODE",
        help="writeback (default); unsafe: as writeback, and flushes are done all the same; none: bypass the page cache; "
        "writethrough, directsync: as writeback and none, and each write is on stable storage before its reply",
    )
    how.add_argument(
        "--discard", default="unmap", metavar="MODE", help="discards of clients: unmap (default) or ignore"
    )
    how.add_argument(
        "--detect-zeroes", choices=("off", "on", "unmap"), default="off",
        help="write zeros of clients as zeros (on), or free their space (unmap); off: as data",
    )  # fmt: skip
    how.add_argument("--aio", metavar="MODE", help="accepted for compatibility; threads execute the requests")
    how.add_argument(
        "--handshake-limit",
        type=_seconds,
        default=10.0,
        metavar="SECONDS",
        help="limit for the handshake (default: 10)",
    )
    how.add_argument(
        "--idle-limit", type=_seconds, metavar="SECONDS", help="disconnect clients without a request for this time"
    )
    how.add_argument(
        "--stall-limit",
        type=_seconds,
        default=60.0,
        metavar="SECONDS",
        help="disconnect clients that stop in the middle of a request, or do not read replies, for this time (default: 60)",
    )
    how.add_argument(
        "--memory-limit",
        type=parse_size,
        metavar="SIZE",
        help="memory for requests of all clients together (default: 256M, and 2M for each client)",
    )
    how.add_argument("--stats", metavar="PATH", help="write counters to this file at the end, as JSON")
    how.add_argument("-v", "--verbose", action="store_true", help="log every client")
    tls = parser.add_argument_group("TLS")
    tls.add_argument(
        "--tls", choices=("off", "allow", "require"), help="use of TLS (default: require, with certificates or keys)"
    )
    tls.add_argument(
        "--tls-certificates", metavar="DIR", help="folder with server-cert.pem, server-key.pem and ca-cert.pem"
    )
    tls.add_argument("--tls-verify-peer", action="store_true", help="clients need a certificate signed by ca-cert.pem")
    tls.add_argument(
        "--tls-allow", action="append", metavar="NAME", help="accept certificates with this name; repeatable"
    )
    tls.add_argument(
        "--tls-rules", metavar="RULES", help="rules for the subjects of certificates: a JSON file, or json:{...}"
    )
    tls.add_argument("--tls-psk-file", metavar="PATH", help="file of pre-shared keys, with USER:HEX in each line")
    parser.add_access()
    parser.add_output()
    parser.add_later("-c", "--connect", "attaching a device needs the kernel's client: use nbd-client", metavar="DEV")
    parser.add_later("-d", "--disconnect", "attaching a device needs the kernel's client: use nbd-client")
    parser.add_later("-L", "--list", "use lamina info --list URI")
    parser.add_later("-n", "--nocache", "use --cache none")
    parser.add_later("-T", "--trace", "use -v, or the filter log", metavar="EVENTS")
    parser.add_later(
        "--tls-hostname", "it is for --list: lamina info --list 'nbds://...?tls-hostname=NAME'", metavar="NAME"
    )
    parser.add_later("-V", "--version", "use lamina --version")
    parser.add_later("--tls-creds", "use --tls-certificates DIR", metavar="ID")
    parser.add_later("--tls-authz", "use --tls-rules FILE, or --tls-allow NAME", metavar="ID")
    parser.add_argument("filenames", metavar="FILE", nargs="*", help="an image; may be repeated")
    return parser


def _agree(args: Namespace) -> None:
    """Raise OptionError for options that are invalid, have no effect, or disable another option."""
    choose(CACHE_MODES, "cache", args.cache)
    choose(DISCARD_MODES, "discard", args.discard)
    if args.aio is not None:
        choose(AIO_MODES, "aio", args.aio)
    if args.folder and (args.offset or args.size is not None or args.partition is not None or args.bitmap):
        raise OptionError("--folder serves whole images, without bitmaps", hint="omit -o, --size, --partition and -B")
    if args.load_snapshot is not None and (args.folder or args.bitmap):
        raise OptionError("-l serves an earlier state of a disk, which has no bitmaps", hint="omit --folder and -B")
    if args.folder and args.image_opts:
        raise OptionError("--folder serves files, not options", hint="omit --image-opts")
    if args.folder and not args.filenames and (args.export_name is not None or args.description):
        raise OptionError("the exports of --folder have the names of their files", hint="omit -x and -D")
    if args.selinux_label is not None and args.socket is None:
        raise OptionError("--selinux-label is the label of a Unix socket", hint="give the socket with -k")
    if args.tls_certificates and args.tls_psk_file:
        raise OptionError("certificates and pre-shared keys exclude each other", hint="give one of them")
    if args.tls_verify_peer and not args.tls_certificates:
        raise OptionError("clients cannot be verified without certificates", hint="add --tls-certificates DIR")
    if args.tls_allow and args.tls_rules is not None:
        raise OptionError("names and rules for certificates exclude each other", hint="give one of them")
    if (args.tls_allow or args.tls_rules is not None) and not args.tls_verify_peer:
        raise OptionError("a list of names requires verified certificates", hint="add --tls-verify-peer")


def _port(text: str) -> int:
    if len(text) > 5 or not text.isascii() or not text.isdecimal() or int(text) > 65535:
        raise OptionError(f"{printable(text)} is not a port", hint="give 0 to 65535")
    return int(text)


def _seconds(text: str) -> float:
    try:
        seconds = float(text) if text.isascii() and "_" not in text else math.nan  # Python accepts more notations
    except ValueError:
        seconds = math.nan
    if not 0 < seconds <= _MOST_SECONDS:
        raise OptionError(f"{printable(text)} is not a time limit", hint=f"give seconds up to {_MOST_SECONDS}")
    return seconds


def _log(verbose: bool) -> None:
    logging.basicConfig(
        level=logging.INFO if verbose else logging.WARNING,
        format=f"{program.current.server_name}: %(message)s",
        stream=sys.stderr,
    )


# -- the exports


def _restricted(args: Namespace, closing: ExitStack) -> list[RestrictedExport]:
    """Open the exports, so that errors of images appear before a client can connect."""
    from ..nbd.server.exports import RestrictedExport

    several = len(args.filenames) > 1 or bool(args.export)
    if several and (args.export_name is not None or args.description):
        raise OptionError("-x and -D describe one export, but there are several", hint="use --export name=...,file=...")
    wanted: list[dict[str, Any]] = []
    for filename in args.filenames:
        name = os.path.basename(filename) if several else args.export_name or ""
        wanted.append({"name": name, "file": filename, "description": args.description})
    wanted += [_parsed(text) for text in args.export]
    restricted = []
    for options in wanted:
        image = _open(args, options)
        closing.callback(image.close)
        _window(image, args, options)
        export = _export(image, args, options)
        allow = options.get("allow")
        names = None
        if allow is not None:
            if not args.tls_verify_peer:
                raise OptionError("allow= requires verified certificates", hint="add --tls-verify-peer")
            from ..nbd.tls import allow_list

            names = allow_list(allow.split(";"))
        restricted.append(RestrictedExport(export, tls_only=options.get("tls-only", False), allow=names))
    return restricted


def _parsed(text: str) -> dict[str, Any]:
    """The options of one `--export`."""
    known = ("name", "file", "format", "description", "writable", "offset", "size", "partition", "tls-only", "allow")
    options: dict[str, Any] = dict(parse_keyval(text))
    for key, value in options.items():
        if key not in known:
            raise OptionError(f"--export has no option {printable(key)}", hint=f"the options are {', '.join(known)}")
        if key in ("writable", "tls-only"):
            if value not in _SWITCHES:
                raise OptionError(f"{key} is {printable(value)}", hint="it takes on or off")
            options[key] = _SWITCHES[value]
        elif key in ("offset", "size"):
            options[key] = parse_size(value)
        elif key == "partition":
            options[key] = _port(value)
    if "file" not in options:
        raise OptionError("--export has no file", hint="--export name=NAME,file=FILE")
    return {"name": os.path.basename(options["file"]), **options}


def _writable(args: Namespace, options: dict[str, Any]) -> bool:
    if args.read_only and (args.writable or args.snapshot):
        raise OptionError("-r and -w exclude each other", hint="give one of them")
    return bool(options.get("writable", args.writable or args.snapshot))


def _open(args: Namespace, options: dict[str, Any]) -> Image:
    format = options.get("format", args.format)
    source, references = image_source(options["file"], args, format), args.references
    if args.load_snapshot is not None:
        from .source_snapshot import snapshot_options

        source, references = snapshot_options(options["file"], args, format, args.load_snapshot)
        format = None
    target = Target(
        name=source if isinstance(source, str) else None,
        options={} if isinstance(source, str) else source,
        format=format,
        read_only=not _writable(args, options),
        cache=args.cache,
        discard=args.discard,
        force_share=args.force_share,
        snapshot=args.snapshot,
        references=references,
        budget=args.limits,
    )
    image = target.open()
    image.node.discards = target.discards
    image.node.zero_detected = {"off": None, "on": 0, "unmap": MAY_UNMAP}[args.detect_zeroes]
    return image


def _window(image: Image, args: Namespace, options: dict[str, Any]) -> None:
    """Restrict the image to the served part."""
    offset, size = options.get("offset", args.offset), options.get("size", args.size)
    partition = options.get("partition", args.partition)
    if partition is not None and (offset or size is not None):
        raise OptionError("a partition and an offset exclude each other", hint="give one of them")
    with image.edit() as edit:
        if partition is not None:
            edit.insert("partition", {"partition": partition})
        elif offset or size is not None:
            edit.insert("offset", {"offset": offset} if size is None else {"offset": offset, "size": size})


def _export(image: Image, args: Namespace, options: dict[str, Any]) -> Any:
    from ..nbd.server.export import Export

    offered = image.node.bitmaps
    bitmaps = {}
    for name in args.bitmap:
        if name not in offered:
            hint = f"it has {', '.join(map(printable, offered))}" if offered else "it has none"
            raise OptionError(f"the image has no bitmap {printable(name)}", path=image.filename, hint=hint)
        bitmaps[name] = offered[name]
    description = options.get("description", "")
    writable = _writable(args, options)
    depth = args.allocation_depth or program.current.offers_depth_always
    return Export(
        image,
        options["name"],
        description=description,
        writable=writable,
        bitmaps=bitmaps,
        depth=depth,
        write_through=CACHE_MODES[args.cache].stable,
    )


def _files(node: Node) -> Iterator[tuple[int, int]]:
    """The device and inode of every file in the graph of `node`."""
    if isinstance(node, StorageNode) and node.identity is not None:
        yield node.identity
    for child in node.children.values():
        yield from _files(child.node)


# -- addresses and TLS


def _tls(
    args: Namespace, restricted: list[RestrictedExport]
) -> tuple[str, ssl.SSLContext | None, frozenset[str] | AccessRules | None]:
    credentials = args.tls_certificates or args.tls_psk_file
    mode = args.tls or ("require" if credentials else "off")
    if (mode == "off") != (not credentials):
        raise OptionError(
            "the TLS mode contradicts the credentials: with certificates or keys TLS is on, without them it is off",
            hint="give --tls-certificates DIR or --tls-psk-file PATH, or --tls off without them",
        )
    guarded = any(each.tls_only for each in restricted)
    if mode == "off":
        if guarded:
            raise OptionError("an export requires TLS, which is off", hint="add --tls-certificates DIR")
        return mode, None, None
    if mode == "allow" and args.tls_psk_file and (args.folder or not guarded):
        raise OptionError(
            "clients without a key could connect without TLS",
            hint="require TLS (--tls require), or set tls-only=on for each export to protect",
        )
    from ..nbd.access_rules import AccessRules
    from ..nbd.tls import allow_list, server_context

    context = server_context(args.tls_certificates, verify_peer=args.tls_verify_peer, psk_file=args.tls_psk_file)
    if args.tls_rules is not None:
        return mode, context, AccessRules.from_text(args.tls_rules)
    return mode, context, allow_list(args.tls_allow) if args.tls_allow else None


def _server(
    args: Namespace,
    restricted: list[RestrictedExport],
    folder: Folder | None,
    mode: str,
    context: ssl.SSLContext | None,
    allow: frozenset[str] | AccessRules | None,
    sockets: list[socket.socket],
) -> Server:
    from ..nbd.server import Server
    from ..nbd.wire import PORT

    if args.shared < 1:
        raise OptionError(f"the number of clients is {args.shared}", hint="give -e 1 or more")
    port = args.port
    if port is None and (args.bind is not None or not (args.socket or sockets)):
        port = PORT
    with new_sockets_labelled(args.selinux_label):
        return Server(
            restricted,
            folder=folder,
            unix=args.socket,
            host=args.bind,
            port=port,
            sockets=sockets,
            tls=mode,
            context=context,
            allow=allow,
            insecure=args.insecure,
            clients=args.shared,
            handshake_time=args.handshake_limit,
            idle_time=args.idle_limit,
            stall_time=args.stall_limit,
            memory_limit=args.memory_limit,
        )


def _announce(args: Namespace, server: Server, restricted: list[RestrictedExport], folder: Folder | None) -> None:
    if not program.current.announces:
        return
    exports = [each.export for each in restricted]
    uris = server.uris
    if args.output == "json":
        told = [
            {"name": e.name, "size": e.size, "read-only": e.read_only, "description": e.description} for e in exports
        ]
        ready = {"uri": uris[0] if uris else None, "uris": uris, "pid": os.getpid(), "exports": told}
        if folder is not None:
            ready["folder"] = str(folder.path)
        print(json.dumps(ready), flush=True)
        return
    for uri in uris:
        print(f"ready: {printable(uri)}", flush=True)
    for export in exports:
        name = printable(export.name) or "(default)"
        print(f"  {name}: {format_size(export.size)}, {'read-only' if export.read_only else 'writable'}", flush=True)
