"""Creating qcow2 images with an external data file: options, and the data file."""

from __future__ import annotations

import os
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

from ...descriptors import opening
from ...errors import NotFound, OptionError
from ...options import stored_name
from ...own_files import is_same_file
from . import layout as q

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from ...request import Child


def prepare(values: dict[str, Any], target: str) -> None:
    """Check the options for a data file of the image at `target`. Completes `values` with its path, and with the size of a
    data file that exists."""
    name = values.get("data_file")
    if not name:
        raise OptionError("an option for a data file is given, but no data file", path=target, hint="give data_file")
    if values["data_file_raw"] and values.get("encrypt") is not None:
        raise OptionError("a raw data file contains the disk unencrypted", path=target, hint="omit data_file_raw")
    if values.get("backing_file") and (values["data_file_raw"] or values["data_file_keep"]):
        raise OptionError(
            "a data file that reads as the whole disk hides the backing file",
            path=target,
            hint="omit data_file_raw and data_file_keep",
        )
    if values["data_file_keep"] and (values["preallocation"] != "off" or values.get("encrypt") is not None):
        raise OptionError(
            "the bytes of a data file that is kept are neither allocated anew nor encrypted",
            path=target,
            hint="omit preallocation and encrypt",
        )
    name = values["data_file"] = stored_name(name)
    # Where the target is a link, names inside the new image are relative to the folder of the file itself.
    path = values["data_file_path"] = os.path.join(os.path.dirname(os.path.realpath(target)), name)
    if is_same_file(target, path):
        raise OptionError("the data file is the new image itself", path=target, hint="name another file")
    if values["data_file_keep"]:
        _keep(values, path)


def _keep(values: dict[str, Any], path: str) -> None:
    from ...graph import open_graph

    with opening(open_graph, {"driver": "file", "filename": path}) as node:
        size = node.size
    if size % q.SECTOR:
        raise OptionError(
            f"the data file has {size} bytes, not a multiple of the sector size {q.SECTOR}",
            path=path,
            hint="extend it (truncate -s %512 FILE)",
        )
    if values.get("size") not in (None, size):
        raise OptionError(
            f"the data file has {size} bytes, and the disk is to have {values['size']}",
            path=path,
            hint="omit the size",
        )
    values["size"] = size


@contextmanager
def open_data_file(values: Mapping[str, Any], size: int) -> Iterator[Child]:
    """The edge to the data file of a new image with a disk of `size` bytes. It is on stable storage at the end."""
    from ...graph import Opener
    from ...policy import Policy

    keep = values["data_file_keep"]
    opener = Opener(read_only=keep, policy=Policy.none())
    with ExitStack() as stack:
        spec = {"driver": "file", "filename": values["data_file_path"]}
        try:
            data = stack.enter_context(opening(opener.child, "data-file", spec, grows=True))
        except NotFound as error:
            raise OptionError("the data file does not exist", path=values["data_file_path"]) from error
        if not keep:
            data.truncate(size)
        yield data
        data.flush()
