"""Clusters that a new image has from the beginning, so that no write has to allocate them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ...limits import MIB, align_up
from ...node import MAY_UNMAP
from . import allocation

if TYPE_CHECKING:
    from collections.abc import Callable

    from .tables import Tables

_ZEROS = memoryview(bytes(MIB))


def preallocate(tables: Tables, how: str, at: int = 0, *, bare: bool = True) -> None:
    """Map the disk from `at` on, where no cluster is allocated, to clusters one after the other, which read as zeros:
    "metadata" leaves them a hole of the file, "falloc" gives them storage, "full" writes them. "external" maps them to what
    an external data file contains. With extended L2 entries and `bare` no subcluster of the others is allocated, so they read
    as the backing file, if there is one."""
    file = tables.data
    commit: Callable[..., None] = allocation.commit
    if tables.header.extended_l2 and bare and how != "external":
        from .subclusters import commit_bare

        commit = commit_bare
    # An external data file is as long as the disk.
    end = tables.header.size if tables.external else align_up(tables.header.size, tables.cluster_size)
    reached = 0
    while at < end:
        found = tables.changing(allocation.reserve, tables, at, end - at)
        if how == "falloc":
            file.zero(found.host, found.length)
        elif how == "full":
            for done in range(0, found.length, len(_ZEROS)):
                file.write(found.host + done, _ZEROS[: min(len(_ZEROS), found.length - done)])
        elif how == "metadata" and commit is allocation.commit and not found.blank:
            file.zero(found.host, found.length, MAY_UNMAP)  # else old bytes of a device become those of the disk
        if found.token is not None:  # else it exists
            tables.changing(commit, tables, *found.token)
        reached = max(reached, found.host + found.length)
        at += found.length
    if file.size < reached:
        file.truncate(reached)
