"""The part of a node (`node.py`) that opens it for writing, or for reading alone, while it is in use."""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING

from .errors import LaminaError, NotSupported

if TYPE_CHECKING:
    from .edge import Edge


class Reopenable:
    """The default refuses; storage does it itself, formats and filters call `reopen_over`."""

    read_only: bool

    if TYPE_CHECKING:

        def flush(self) -> None: ...
        def refuse(self, operation: str) -> NotSupported: ...

    def reopen(self, read_only: bool) -> None:
        """Open this node, which is open in the other way, for reading alone or for writing, without closing it. Called with
        no request running. Where it raises, the node is as it was: NotSupported where the driver cannot; ReadOnly, Locked,
        CorruptImage, BlockIOError where the node or its file does not allow it.

        A driver that holds nothing which depends on it calls `reopen_over` with the children that it writes to, and overrides
        `stop_writing` and `begin_writing` where it has something to do."""
        raise self.refuse("reopening")

    def reopen_over(self, children: Iterable[Edge], read_only: bool) -> None:
        """`reopen` for a node that writes to `children`, all of which are reopened in the same way: before this node for
        writing, and after it has written what it holds back for reading alone."""
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
        """The children are open for writing, and this node is about to be. Raises what `open` would raise."""

    def stop_writing(self) -> None:
        """This node is about to be open for reading alone: write what it holds back."""
        self.flush()
