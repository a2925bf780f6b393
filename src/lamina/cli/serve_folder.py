"""The exports of `lamina serve --folder`."""

from __future__ import annotations

import errno
import os
from argparse import Namespace
from typing import TYPE_CHECKING

from ..errors import BlockIOError, OptionError, printable
from .io.target import CACHE_MODES

if TYPE_CHECKING:
    from ..image import Image
    from ..nbd.server.exports import Folder


def folder_of(args: Namespace, *, writable: bool) -> Folder | None:
    """The exports of `--folder`; None without that option. OptionError for a format that is none, or missing."""
    if not args.folder:
        return None
    if not os.path.isdir(args.folder):
        raise BlockIOError("it is not a folder", errno=errno.ENOTDIR, path=args.folder, operation="serve")
    if args.writable and not args.format:
        raise OptionError("writing requires an explicit format", path=args.folder, hint="give it: -f raw, -f qcow2")
    from ..nbd.server.exports import Folder

    _format_of_folder(args)
    return Folder(
        args.folder,
        open_fd=lambda path, fd: _open_fd(args, path, fd, writable=writable),
        writable=writable,
        snapshot=args.snapshot,
        write_through=CACHE_MODES[args.cache].stable,
    )


def _format_of_folder(args: Namespace) -> None:
    from .. import registry

    if args.format and registry.entry(args.format).kind != "format":
        raise OptionError(f"{printable(args.format)} is not a format", path=args.folder, hint="give -f raw or -f qcow2")


def _open_fd(args: Namespace, path: str, fd: int, *, writable: bool) -> Image:
    """The image in an open file of the folder. Its name is always a path."""
    from ..graph import open_graph
    from ..image import Image

    file = {"driver": "file", "filename": path, "cache": {"direct": CACHE_MODES[args.cache].direct}}
    node = open_graph(
        {"file": file, "discard": args.discard},
        format=args.format or "probe",
        read_only=not writable,
        policy=args.references,
        budget=args.limits,
        force_share=args.force_share,
        snapshot=args.snapshot,
        fd=fd,
    )
    return Image(node, budget=args.limits)
