"""The functions that users call first: `open` and `probe`."""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

from .graph import Opener, named, open_graph
from .graph import probe as _probe
from .image import Image
from .limits import DEFAULT_BUDGET, Budget
from .policy import Policy
from .request import Child
from .root import Graph


def open(
    source: str | os.PathLike[str] | Mapping[str, Any],
    *,
    format: str | None = None,
    read_only: bool = True,
    references: Policy | None = None,
    budget: Budget = DEFAULT_BUDGET,
    force_share: bool = False,
    snapshot: bool = False,
    graph: Graph | None = None,
) -> Image:
    """Open a disk image.

    `source` is a path, a name with a prefix (`json:{...}`, `blkdebug::disk.qcow2`; a `Path` is a path, whatever it looks
    like), or nested options (`{"driver": "blkdebug", "align": 4096, "image": {...}}`). `format` names the driver that lies
    over a plain path; it is never guessed unless asked for with "probe", since the content of a raw disk belongs to its
    guest. Images open read-only unless told otherwise, and so does every backing file, always.

    `references` decides which files may be opened because an image names them. The default is `Policy.default()`: the own
    folder of the image, without hidden files, unless this site set another one. An image whose format was found with "probe"
    opens no other file until `references` grants it. Services that open what strangers upload give `Policy.none()`.
    `budget` bounds what the images may cost. `force_share` reads beside a program that has the image open for
    writing: what is read may then be inconsistent. `snapshot` keeps all changes in memory (the filter `cow`) and the image as
    it is: it is opened for reading, whatever `read_only` says, and what was written is gone with the `close`. `graph`: the
    nodes become part of it (`image.graph`), and options may name the nodes that are there: where a child is expected, the
    `node-name` of a node stands for that node.

    Raises a `LaminaError`: OptionError, NotFound, BlockIOError, FormatError, PolicyError, Locked, LimitExceeded.
    """
    node = open_graph(
        named(source),
        format=format,
        read_only=read_only,
        policy=references,
        budget=budget,
        force_share=force_share,
        snapshot=snapshot,
        graph=graph,
    )
    try:
        return Image(node, budget=budget)
    except BaseException:
        node.close()
        raise


def probe(source: str | os.PathLike[str], *, force_share: bool = True) -> str:
    """The format that the magic in a file says it has: "qcow2", "vmdk", ...; "raw" if there is none.

    Raises FormatError if it could be several. A guess is no proof: a guest can write any magic into its raw disk.
    """
    storage = Child(Opener(force_share=force_share).open(named(source), storage=True), "file")
    try:
        return _probe(storage).format
    finally:
        storage.close()
