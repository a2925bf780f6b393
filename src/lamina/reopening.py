"""The part of a node (`node.py`) that opens it for writing, or for reading alone, while it is in use."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import LaminaError, NotSupported

if TYPE_CHECKING:
    from .edge import Edge


class Reopenable:
    """The default refuses; storage overrides `reopen`; formats and filters call `reopen_over`."""

    read_only: bool

    if TYPE_CHECKING:

        def flush(self) -> None: ...
        def refuse(self, operation: str) -> NotSupported: ...

    @property
    def immutable(self) -> bool:
        """Whether no request to this node or to a node below it changes the result of `extents`, and the query itself has no
        effect (on a counter, or an injected fault). Edits, reopenings and truncations, which stop all requests of the graph,
        may change it, and another program may fill or punch a hole in a file. Each class declares this itself."""
        return False

    def reopen(self, read_only: bool) -> None:
        """Make this node read-only or writable without closing it. No request runs meanwhile. An
        exception leaves the node as it was: NotSupported from a driver without `reopen`; ReadOnly, Locked, CorruptImage or
        BlockIOError if the node or its file does not allow it.

        A driver calls `reopen_over` with the children that it writes to, and overrides `begin_writing` and `stop_writing` if
        it has state that depends on the mode."""
        raise self.refuse("reopening")

    def reopen_over(self, children: Iterable[Edge], read_only: bool) -> None:
        """The `reopen` of a node that writes to `children`. For writing, the children are reopened before `begin_writing`;
        for reading, after `stop_writing`."""
        if read_only:
            self.stop_writing()
        done: list[Edge] = []
        try:
            for child in children:
                done.append(child)
                child.reopen(read_only)
            if not read_only:
                self.begin_writing()
        except BaseException:
            for child in done:
                with suppress(LaminaError):
                    child.reopen(not read_only)
            raise
        self.read_only = read_only

    def begin_writing(self) -> None:
        """The children are writable, and this node is about to be. Raises the errors of `open`."""

    def stop_writing(self) -> None:
        """This node is about to become read-only: write back all cached changes."""
        self.flush()
