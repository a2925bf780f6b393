"""All connections of the clients of this process: what becomes of them when it must end, and in a child that it forks."""

from __future__ import annotations

from typing import TYPE_CHECKING
from weakref import WeakSet

from .. import lifecycle

if TYPE_CHECKING:
    from .client.link import Link

_links: WeakSet[Link] = WeakSet()


def note(link: Link) -> None:
    """`link` has just been made."""
    _links.add(link)
    lifecycle.connected.add(link)


def abandon_all() -> None:
    """Break every connection of this process without reconnecting: the threads that wait for a server get an error now. For a
    program that ends and whose server says nothing; from any thread."""
    for link in lifecycle.all_of(_links):
        link.abandon()
